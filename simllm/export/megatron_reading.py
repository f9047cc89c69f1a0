"""The plan that Megatron-LM's arguments describe.

Names and meanings are those of ``megatron/training/arguments.py`` of Megatron-LM with Megatron-Core 0.16.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from math import prod
from typing import Any

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.export.job import Imported
from simllm.export.megatron import RECOMPUTE_MODULES
from simllm.export.megatron_keys import FLAGS, NUMBERS, RULES
from simllm.export.megatron_model_reading import model_from_arguments
from simllm.hardware.stack import load_stack
from simllm.models.context import CP_COMM_TYPES
from simllm.parallel.plan import even_split, split_layers

__all__ = ["read"]


def read(text: str, gpus: int | None = None) -> Imported:
    """The plan that arguments describe.

    Parameters
    ----------
    text : str
        Arguments, or a whole command with them.
    gpus : int, optional
        GPUs of the run; needed to know the groups of hybrid sharding.

    Raises
    ------
    InputError
        An argument is mistyped, has no value or a wrong one, or changes the cost in a way that is not modelled.
    """
    args = _parse(text)
    stack = "megatron-core"
    notes = [*RULES.notes(args, stack)]
    model = model_from_arguments(args)
    if args.get("overlap-grad-reduce") is None and args.get("use-distributed-optimizer"):
        notes.append(f"gradients overlap with the backward pass as in {stack}, though --overlap-grad-reduce is not set")
    multiple = round(load_stack(stack).vocab_multiple.si)
    if args.get("make-vocab-size-divisible-by", multiple) != multiple:
        notes.append(f"the vocabulary is padded to multiples of {multiple}, not of --make-vocab-size-divisible-by")
    settings: dict[str, Any] = {"stack": stack}
    for name, option in (
        ("tensor-model-parallel-size", "tp"),
        ("pipeline-model-parallel-size", "pp"),
        ("context-parallel-size", "cp"),
        ("expert-model-parallel-size", "ep"),
        ("expert-tensor-parallel-size", "etp"),
        ("micro-batch-size", "micro_batch_size"),
        ("global-batch-size", "global_batch_size"),
        ("seq-length", "seq_len"),
    ):
        if name in args:
            settings[option] = args[name]
    settings |= _read_context(args, settings.get("cp", 1))
    tp, pp = settings.get("tp", 1), settings.get("pp", 1)
    if "num-experts" in args:
        settings.setdefault("etp", tp)
    else:
        settings.pop("etp", None)
    settings["sequence_parallel"] = bool(args.get("sequence-parallel")) and tp > 1
    settings |= _read_stages(args, pp) | _read_precision(args) | _read_optimizer(args) | _read_capacity(args)
    settings["recompute"] = _read_recompute(args, pp * settings.get("vpp", 1), bool(settings.get("uneven_layers")))
    settings |= _read_sharding(args, tp * pp * settings.get("cp", 1), settings.get("cp", 1), gpus)
    return Imported(framework="megatron", settings=settings, model=model, notes=tuple(notes))


def _read_context(args: Mapping[str, Any], cp: int) -> dict[str, Any]:
    """The kind of context parallelism, and the ranks that trade tokens for heads where it has two levels."""
    kind = args.get("cp-comm-type", "p2p")
    if kind not in CP_COMM_TYPES:
        raise unknown_name("--cp-comm-type", str(kind), CP_COMM_TYPES)
    if cp == 1:
        return {}
    if kind != "a2a+p2p":
        return {"cp_comm_type": kind}
    sizes = str(args.get("hierarchical-context-parallel-sizes", "")).split()
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes) or prod(map(int, sizes)) != cp:
        raise InputError(
            f"--cp-comm-type a2a+p2p needs --hierarchical-context-parallel-sizes A B, whose product is cp={cp}"
        )
    inner, outer = map(int, sizes)
    if 1 in (inner, outer):
        return {"cp_comm_type": "p2p" if inner == 1 else "a2a"}
    return {"cp_comm_type": kind, "cp_a2a": inner}


def _parse(text: str) -> dict[str, Any]:
    """Arguments by their names; numbers as numbers, switches as True."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError(f"the arguments cannot be read: {error}") from None
    script = max((place for place, word in enumerate(words) if word.endswith(".py")), default=-1)
    args: dict[str, Any] = {}
    name = None
    values: dict[str, list[str]] = {}
    for word in words[script + 1 :]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values[name] = [value] if equals else []
        elif name is None:
            raise InputError(f"{word!r} is not an argument of Megatron-LM; they begin with --")
        else:
            values[name].append(word)
    if not values:
        raise InputError("there is no argument in the file; write them as --tensor-model-parallel-size 8")
    for name, given in values.items():
        args[name] = _value(name, given)
    return args


def _value(name: str, given: list[str]) -> Any:
    if name in FLAGS:
        if given:
            raise InputError(f"--{name} is a switch and takes no value, but {' '.join(given)} follows it")
        return True
    if name not in RULES.used:
        return " ".join(given) or True
    if not given:
        raise InputError(f"--{name} has no value")
    text = " ".join(given)
    if "$" in text:
        raise InputError(f"--{name} {text} is a variable of a script; write its value")
    if name not in NUMBERS:
        return text
    try:
        number = float(text) if NUMBERS[name] is float else int(text)
    except ValueError:
        raise InputError(f"--{name} {text} is not a number") from None
    if number < 0 or (number == 0 and name not in ("attention-dropout", "clip-grad", "hidden-dropout", "sgd-momentum")):
        raise InputError(f"--{name} {text} must be above zero")
    return number


def _read_stages(args: Mapping[str, Any], pp: int) -> dict[str, Any]:
    layers = args.get("num-layers")
    if "pipeline-model-parallel-layout" in args:
        sizes = _layout_sizes(args["pipeline-model-parallel-layout"])
        if len(sizes) % pp:
            raise InputError(f"the pipeline layout has {len(sizes)} stages, which pp={pp} does not divide")
        vpp = len(sizes) // pp
        return _schedule(vpp) | _split_named(sum(sizes), tuple(sizes), "--pipeline-model-parallel-layout")
    vpp = args.get("num-virtual-stages-per-pipeline-rank", 1)
    first, last = args.get("decoder-first-pipeline-num-layers"), args.get("decoder-last-pipeline-num-layers")
    settings: dict[str, Any] = {}
    if "num-layers-per-virtual-pipeline-stage" in args:
        if layers is None:
            raise InputError("--num-layers-per-virtual-pipeline-stage needs --num-layers to mean a number of chunks")
        padded = layers + sum(bool(args.get(f"account-for-{end}-in-pipeline-split")) for end in ("embedding", "loss"))
        per_chunk = args["num-layers-per-virtual-pipeline-stage"]
        if padded % (pp * per_chunk):
            raise InputError(f"{padded} layers do not divide into chunks of {per_chunk} on pp={pp} ranks")
        vpp = padded // pp // per_chunk
    elif first or last:
        if layers is None:
            raise InputError("--decoder-first/last-pipeline-num-layers need --num-layers")
        middle = pp - bool(first) - bool(last)
        rest = layers - (first or 0) - (last or 0)
        if middle < 1 or rest % middle or vpp > 1:
            raise UnsupportedError("these --decoder-first/last-pipeline-num-layers are not modelled")
        sizes = [*([first] if first else []), *[rest // middle] * middle, *([last] if last else [])]
        settings = _split_named(layers, tuple(sizes), "--decoder-first/last-pipeline-num-layers")
    elif layers is not None and pp > 1:
        padding = sum(bool(args.get(f"account-for-{end}-in-pipeline-split")) for end in ("embedding", "loss"))
        if (layers + padding) % (pp * vpp):
            raise InputError(f"{layers} layers do not divide into {pp * vpp} chunks, as Megatron-LM demands")
        size = (layers + padding) // (pp * vpp)
        split = [size] * (pp * vpp)
        split[0] -= bool(args.get("account-for-embedding-in-pipeline-split"))
        split[-1] -= bool(args.get("account-for-loss-in-pipeline-split"))
        settings = _split_named(layers, tuple(split), "--account-for-embedding/loss-in-pipeline-split")
    return _schedule(vpp) | settings


def _schedule(vpp: int) -> dict[str, Any]:
    return {"vpp": vpp, "schedule": "interleaved" if vpp > 1 else "1f1b"}


def _split_named(layers: int, sizes: tuple[int, ...], argument: str) -> dict[str, Any]:
    """How the split of a pipeline is called, where it is one of those modelled."""
    if even_split(layers, len(sizes)) == sizes:
        return {"uneven_layers": False}
    if even_split(layers, len(sizes)) is None and split_layers(layers, len(sizes), uneven=True) == sizes:
        return {"uneven_layers": True}
    raise UnsupportedError(
        f"{argument}: chunks of {', '.join(map(str, sizes))} layers are not modelled; {layers} layers over "
        f"{len(sizes)} chunks are dealt out as {', '.join(map(str, split_layers(layers, len(sizes), uneven=True)))}"
    )


def _layout_sizes(layout: str) -> list[int]:
    """Transformer layers of each stage of a layout string.

    >>> _layout_sizes("E|(t|)*3,m|m||L"), _layout_sizes("Ett|ttL"), _layout_sizes("Et*2|t*3L")
    ([0, 1, 1, 1, 0, 0, 0, 0], [2, 2], [2, 3])
    """
    body = layout.replace(",", "").replace(" ", "").strip("\"'")
    for _ in range(8):
        body = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), body)
    body = re.sub(r"([Etm L|])\*(\d+)", lambda m: m[1] * int(m[2]), body)
    if not re.fullmatch(r"[EtmL|]+", body):
        raise InputError(f"--pipeline-model-parallel-layout {layout} is not understood; write it as E|(t|)*30L")
    return [stage.count("t") for stage in body.split("|")]


def _read_precision(args: Mapping[str, Any]) -> dict[str, Any]:
    if args.get("fp16") and args.get("bf16"):
        raise InputError("--fp16 and --bf16 contradict each other")
    if "fp4-format" in args:
        return {"precision": "nvfp4"}
    if "fp8-format" in args:
        return {"precision": "mxfp8" if args.get("fp8-recipe") == "mxfp8" else "fp8"}
    return {"precision": "bf16" if args.get("bf16") else "fp16" if args.get("fp16") else "fp32"}


def _read_capacity(args: Mapping[str, Any]) -> dict[str, Any]:
    factor = args.get("moe-expert-capacity-factor")
    if factor is None:
        return {}
    if not args.get("moe-pad-expert-input-to-capacity"):
        raise UnsupportedError(
            f"--moe-expert-capacity-factor {factor:g} without --moe-pad-expert-input-to-capacity is not modelled; "
            "experts that take a fixed number of rows are"
        )
    return {"capacity_factor": factor}


def _read_optimizer(args: Mapping[str, Any]) -> dict[str, Any]:
    name = args.get("optimizer", "adam")
    if name not in ("adam", "sgd", "muon"):
        raise unknown_name("--optimizer", name, ("adam", "sgd", "muon"))
    momentum = args.get("sgd-momentum", 0.9)
    settings: dict[str, Any] = {"optimizer": "sgd-momentum" if name == "sgd" and momentum else name}
    if args.get("clip-grad", 1.0) == 0:
        settings["gradient_clipping"] = False
    if args.get("grad-reduce-in-bf16"):
        settings["gradient_precision"] = "bf16"
    elif args.get("accumulate-allreduce-grads-in-fp32"):
        settings["gradient_precision"] = "fp32"
    return settings


def _read_recompute(args: Mapping[str, Any], chunks: int, uneven: bool) -> str:
    granularity = args.get("recompute-granularity")
    if args.get("recompute-activations"):
        granularity = "selective"
    if granularity is None:
        return "none"
    if granularity == "selective":
        modules = args.get("recompute-modules", "core_attn").split()
        if modules == ["core_attn"]:
            return "selective"
        for module in modules:
            if module not in RECOMPUTE_MODULES:
                raise UnsupportedError(
                    f"--recompute-modules {' '.join(modules)} is not modelled; core_attn alone, or "
                    f"{', '.join(RECOMPUTE_MODULES)} are"
                )
        return "list:" + ",".join(operator for module in modules for operator in RECOMPUTE_MODULES[module])
    if granularity != "full":
        raise unknown_name("--recompute-granularity", granularity, ("full", "selective"))
    number = args.get("recompute-num-layers", 1)
    if args.get("recompute-method") == "block":
        layers = args.get("num-layers")
        if layers is None:
            raise InputError("--recompute-method block needs --num-layers to mean a share of the layers")
        sizes = set(split_layers(layers, chunks, uneven))
        if number >= max(sizes):
            return "full"
        if len(sizes) > 1 or min(sizes) % number:
            raise UnsupportedError(
                f"--recompute-num-layers {number} of {' and '.join(map(str, sorted(sizes)))} layers a chunk is not "
                "every n-th layer; give --recompute"
            )
        return f"every:{min(sizes) // number}"
    if number != 1:
        raise UnsupportedError(f"--recompute-num-layers {number} with uniform units is not modelled; 1 is")
    return "full"


def _read_sharding(args: Mapping[str, Any], replica: int, cp: int, gpus: int | None) -> dict[str, Any]:
    instances = args.get("num-distributed-optimizer-instances", 1)
    if args.get("use-torch-fsdp2"):
        again = not args.get("torch-fsdp2-no-reshard-after-forward")
        return {"zero": "3" if again else "2"}
    if not args.get("use-megatron-fsdp"):
        if not args.get("use-distributed-optimizer"):
            return {"zero": "0"}
        groups = {"hsdp_shard": _group_ranks(instances, replica, cp, gpus)} if instances > 1 else {}
        return {"zero": "1", **groups}
    strategies = {"no_shard": "0", "optim": "1", "optim_grads": "2", "optim_grads_params": "3"}
    strategy = args.get("data-parallel-sharding-strategy", "no_shard")
    if strategy not in strategies:
        raise unknown_name("--data-parallel-sharding-strategy", strategy, strategies)
    if instances == 1:
        return {"zero": strategies[strategy]}
    if strategies[strategy] != "3":
        raise UnsupportedError(f"--num-distributed-optimizer-instances {instances} with {strategy} is not modelled")
    return {"zero": "hsdp", "hsdp_shard": _group_ranks(instances, replica, cp, gpus)}


def _group_ranks(instances: int, replica: int, cp: int, gpus: int | None) -> int:
    """Ranks that share the states of one of several optimizers."""
    if gpus is None:
        raise InputError("--num-distributed-optimizer-instances means groups of a number of GPUs; give --gpus")
    if gpus % (replica * instances):
        raise InputError(f"{instances} optimizer instances do not divide {gpus} GPUs over {replica} of a replica")
    return gpus // replica * cp // instances
