"""The software of a published run: a stack by the framework's name, corrected by what the row states.

A stated setting always beats the habit of the stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import msgspec

from simllm.errors import InputError
from simllm.hardware.stack import BytesPer, Fraction, Overlap, Stack, list_stacks, load_stack
from simllm.validation.table import Row

__all__ = [
    "MEGATRON_UNTIL_2022",
    "base_stack",
    "capacity_of",
    "check_task",
    "dropout_of",
    "run_stack",
    "state_what_is_not_modelled",
]

_Load = Callable[[str], Stack]

#: What stands in for a framework that no stack names.
_FALLBACK = "megatron-core"

#: The Megatron frameworks of 2019 to 2022 train with dropout 0.1 (arXiv:1909.08053, section 4.2), later ones without,
#: and in fp16 where nothing else is said (their example scripts: --fp16).
MEGATRON_UNTIL_2022 = frozenset({"megatron-lm", "megatron-deepspeed"})
_DROPOUT = 0.1


@lru_cache(maxsize=1)
def _prefixes() -> tuple[tuple[str, str], ...]:
    """Every framework prefix with its stack, the longest first."""
    pairs = [(prefix.casefold(), name) for name in list_stacks() for prefix in load_stack(name).frameworks]
    return tuple(sorted(pairs, key=lambda pair: -len(pair[0])))


def base_stack(row: Row) -> str:
    """The name of the stack of a row, before what the row states about its settings."""
    framework = row.text("framework")
    found = next((name for prefix, name in _prefixes() if framework.casefold().startswith(prefix)), None)
    if found is None:
        row.assume(f"framework {framework!r} is in no stack; {_FALLBACK} stands in")
        return _FALLBACK
    if found == "megatron-lm" and _states_flash(row):
        row.assume("Megatron-LM with flash attention is that of 2023 and later: megatron-core")
        return "megatron-core"
    settings = row.text("overlap_notes").casefold()
    if found == "torchtitan" and settings and "compile" not in settings + row.text("notes").casefold():
        row.assume("the settings name no torch.compile: torchtitan-eager")
        return "torchtitan-eager"
    return found


def dropout_of(row: Row, name: str) -> float:
    """The probability of dropout that a stack trains with."""
    if name not in MEGATRON_UNTIL_2022:
        return 0.0
    row.assume(f"dropout {_DROPOUT}, the default of the Megatron frameworks until 2022")
    return _DROPOUT


def run_stack(row: Row, name: str, load: _Load = load_stack) -> Stack:
    """A stack with the settings that the row states.

    Parameters
    ----------
    row : Row
    name : str
    load : callable
        Gives a stack by its name.
    """
    stack = load(name)
    for refine in _REFINEMENTS:
        changed = refine(row, stack, load)
        if changed is not None:
            stack, sentence = changed
            row.assume(sentence)
    return stack


def _states_flash(row: Row) -> bool:
    return row.text("flash_attention") not in ("", "0", "0.0")


def _attention(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """The attention kernel that the row states."""
    given = row.text("flash_attention").casefold().removesuffix(".0")
    kernel = stack.kernels.attention
    if given in ("2", "3"):
        wanted = f"flash{given}"
    elif given in ("0", "false"):
        wanted = "unfused"
    elif given and kernel == "unfused":
        wanted = "best"
    else:
        return None
    if wanted == kernel:
        return None
    kernels = msgspec.structs.replace(stack.kernels, attention=wanted)
    return msgspec.structs.replace(stack, kernels=kernels), f"flash_attention={given}: attention runs {wanted}"


def _no_overlap(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """A run with all overlap switched off."""
    if "non-overlap" not in row.text("overlap_notes").casefold():
        return None
    shown = Fraction(value=1, unit="fraction", source="stated for this run: no overlap", basis="derived")
    overlap = Overlap(**dict.fromkeys(Overlap.__struct_fields__, shown))
    return msgspec.structs.replace(stack, overlap=overlap), "the settings exclude overlap: all communication shows"


def _tensor_parallel_overlap(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """Tensor-parallel communication overlapped or not, as the settings say."""
    settings = row.text("overlap_notes").casefold()
    if "non-overlap" in settings:
        return None
    stated = re.search(r"\b(tp|tensor.parallel) comm(unication)? overlap( off)?|async tp|asynctp", settings)
    overlapped, exposed = load("nemo"), load("megatron-core")
    now = stack.overlap.tensor_parallel_exposed.si
    if stated and not (stated.group(3) or ""):
        share, what = overlapped.overlap.tensor_parallel_exposed, "tensor-parallel communication is overlapped"
    elif stated or (settings and now < 1 and "overlap" in settings):
        share, what = (
            exposed.overlap.tensor_parallel_exposed,
            "tensor-parallel communication is overlapped in the backward pass only",
        )
    else:
        return None
    if share.si == now:
        return None
    overlap = msgspec.structs.replace(stack.overlap, tensor_parallel_exposed=share)
    return msgspec.structs.replace(stack, overlap=overlap), f"by the row's settings {what}"


def _gradients_in_16_bits(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """Gradients reduced in 16 bits where the settings say so (Composer's mode PURE, NeMo's grad_sync_dtype)."""
    text = f"{row.text('overlap_notes')} {row.text('notes')}".casefold()
    if not ("mode=pure" in text or "grad_sync bf16" in text) or stack.states.gradient_on_wire.si == 2:
        return None
    wire = BytesPer(value=2, unit="B/param", source="stated for this run: gradients reduced in bf16", basis="derived")
    states = msgspec.structs.replace(stack.states, gradient_on_wire=wire)
    return msgspec.structs.replace(stack, states=states), "gradients are reduced in 16 bits, as the notes state"


def _parameters_in_8_bits(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """Parameters gathered in 8 bits where the settings say so."""
    text = f"{row.text('overlap_notes')} {row.text('notes')}".casefold()
    if not ("fp8_params" in text or "float8 all-gather" in text):
        return None
    copy = BytesPer(value=1, unit="B/param", source="stated for this run: parameters gathered in fp8", basis="derived")
    states = msgspec.structs.replace(stack.states, gathered_parameter=copy)
    return msgspec.structs.replace(stack, states=states), "parameters are gathered in 8 bits, as the settings state"


def _loss_before_2025(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """torchtitan compiles its loss since 2025; before, the float32 steps of cross-entropy were tensors of their own."""
    dated = re.search(r"_20(\d\d)-?[01]\d\b|_20(\d\d)[01]\d_|arXiv:(\d\d)[01]\d\.", row.text("source"))
    if stack.name != "torchtitan" or (dated and int(next(filter(None, dated.groups()))) >= 25):
        return None
    saved = BytesPer(
        value=14,
        unit="B/param",
        source="logits in bf16, a float32 copy, the float32 log-softmax and its float32 gradient, which becomes bf16",
        basis="derived",
    )
    costs = msgspec.structs.replace(stack.costs, logits_saved=saved)
    return msgspec.structs.replace(stack, costs=costs), "the loss is not compiled, as in torchtitan until 2024"


def _fused_experts(row: Row, stack: Stack, load: _Load) -> tuple[Stack, str] | None:
    """Megatron-Bridge since 26.06: one kernel for the products of all experts in mxfp8, and graphs of whole steps.

    The kernels are for Blackwell (release notes of Megatron-Bridge 0.5.1: grouped GEMM fused by CuTeDSL, CUDA graphs of
    full iterations).
    """
    container = re.search(r"\b(\d\d)\.(\d\d)(?:\.\d+)? NeMo Container", f"{row.text('source')} {row.text('notes')}")
    blackwell = row.text("gpu").casefold().startswith(("b200", "b300", "gb200", "gb300"))
    if stack.name != "megatron-bridge" or container is None or not blackwell:
        return None
    if row.text("precision").casefold() != "mxfp8" or (int(container[1]), int(container[2])) < (26, 6):
        return None
    kernels = msgspec.structs.replace(stack.kernels, expert_extras="fused")
    costs = msgspec.structs.replace(stack.costs, expert_launch=None, expert_wait=None)
    stack = msgspec.structs.replace(stack, kernels=kernels, costs=costs)
    return stack, "one kernel for all experts and CUDA graphs of whole steps, as Megatron-Bridge has since 26.06"


_REFINEMENTS: tuple[Callable[[Row, Stack, _Load], tuple[Stack, str] | None], ...] = (
    _attention,
    _no_overlap,
    _tensor_parallel_overlap,
    _gradients_in_16_bits,
    _parameters_in_8_bits,
    _loss_before_2025,
    _fused_experts,
)


#: What notes may state and the engine does not model, with the sentence that says what is priced instead.
_NOT_MODELLED = (
    (r"cuda graph", "the gain of CUDA graphs is not priced"),
    (r"(?<!w/o )(?<!without )\bmtp\b", "layers for multi-token prediction are not priced"),
)


def capacity_of(row: Row) -> float | None:
    """The capacity factor of the experts that the row states; None where no token is dropped.

    Recipes that drop tokens without saying more do it at a factor of 1 and pad up to it (Megatron-Core, MoE README:
    moe_expert_capacity_factor, moe_pad_expert_input_to_capacity).
    """
    text = " ".join(row.text(name) for name in ("model_name", "overlap_notes", "notes")).casefold()
    stated = re.search(r"capacity factor\s*(\d+(?:\.\d+)?)", text)
    if stated:
        factor = float(stated[1])
    elif re.search(r"token.?drop(?!less)|pad.to.capacity", text):
        factor = 1.0
    else:
        return None
    row.assume(
        f"experts take a fixed number of rows, {factor:g} times their mean share: as evenly as balance is forced"
    )
    return factor


def state_what_is_not_modelled(row: Row) -> None:
    """Record what the row states about its run and the engine leaves out."""
    text = " ".join(row.text(name) for name in ("model_name", "overlap_notes", "notes")).casefold()
    for pattern, sentence in _NOT_MODELLED:
        if re.search(pattern, text):
            row.assume(sentence)


def check_task(row: Row) -> None:
    """Refuse what is neither training of all parameters nor LoRA.

    Raises
    ------
    InputError
    """
    task = row.text("task").casefold()
    if task not in ("", "pretrain", "pretraining", "sft", "lora"):
        raise InputError(f"task={task} is not modelled here; full training (pretrain, sft) and lora are")
    if task == "sft":
        row.assume("fine-tuning of all parameters costs what pre-training costs; packed sequences count as full")
