"""The plan: how a model is split over GPUs, and what makes a plan impossible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.context import CP_COMM_TYPES, CpCommType
from simllm.models.graph import Layout
from simllm.models.routing import BALANCED, Routing
from simllm.models.spec import AttentionSpec, MambaSpec, MoESpec
from simllm.parallel.offload import Offload
from simllm.parallel.schedules import SCHEDULES, Schedule, check_schedule

__all__ = [
    "PRECISIONS",
    "ZERO_STAGES",
    "Plan",
    "check_plan",
    "check_virtual_tokens",
    "cut_inside_a_block",
    "even_split",
    "heads_fault",
    "inner_degree",
    "split_layers",
]

ZERO_STAGES = ("0", "1", "2", "3", "hsdp")
PRECISIONS = ("bf16", "fp16", "fp32", "tf32", "fp8", "mxfp8", "nvfp4")

Zero = Literal["0", "1", "2", "3", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of parallelism, batch, precision and recomputation.

    Attributes
    ----------
    tp, pp, cp, dp : int
        Tensor, pipeline, context and data parallelism; their product is the number of GPUs.
    vpp : int
        Model chunks per pipeline rank (arXiv:2104.04473 section 2.2); 2 in the schedules laid out as a V.
    cp_comm_type : {"p2p", "all_gather", "a2a", "a2a+p2p"}
        How context-parallel ranks come to the keys of all tokens, as in Megatron-Core: round a ring, by gathering them,
        by trading tokens for heads (Ulysses), or by trading among near ranks and a ring over far ones.
    cp_a2a : int
        With ``a2a+p2p`` the ranks that trade tokens for heads, the first of Megatron-Core's
        ``hierarchical-context-parallel-sizes``; 0 otherwise.
    ep, etp : int
        Expert parallelism, and tensor parallelism inside an expert. Expert groups are made of the ranks of the
        tp x cp x dp ranks of a pipeline stage.
    zero : {"0", "1", "2", "3", "hsdp"}
        What data parallelism shards (arXiv:1910.02054): nothing, optimizer states, gradients too, parameters too.
        ``hsdp`` is stage 3 inside groups of ``hsdp_shard`` ranks, replicated over the groups.
    hsdp_shard : int
        Ranks in an HSDP group; 0 means those of one scale-up domain.
    sequence_parallel : bool
        Activations outside the tensor-parallel region are split along the sequence too.
    micro_batch_size : int
        Sequences per data-parallel rank and micro-step.
    global_batch_size : int
        Sequences per optimizer step.
    recompute : Recompute
    precision : str
        Of the matrix products.
    schedule : str
        A name in `simllm.parallel.schedules.SCHEDULES`.
    offload : Offload
        What is kept in the host's memory or on its drives.
    uneven_layers : bool
        Layers that the pipeline does not divide are dealt out all the same, the last stages shorter (DeepSpeed).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_comm_type: CpCommType = "p2p"
    cp_a2a: int = 0
    ep: int = 1
    etp: int = 1
    dp: int = 1
    zero: Zero = "1"
    hsdp_shard: int = 0
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 1
    recompute: Recompute = field(default_factory=Recompute)
    precision: str = "bf16"
    schedule: str = "1f1b"
    uneven_layers: bool = False
    offload: Offload = field(default_factory=Offload)

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "micro_batch_size", "global_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**7:
                raise InputError(f"{name}={value} must be a whole number from 1 to 10000000")
        for what, value, known in (
            ("ZeRO stage", self.zero, ZERO_STAGES),
            ("schedule", self.schedule, SCHEDULES),
            ("kind of context parallelism", self.cp_comm_type, CP_COMM_TYPES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise unknown_name(what, str(value), known)
        if self.global_batch_size % (self.dp * self.micro_batch_size):
            per_rank = self.global_batch_size / self.dp
            raise InputError(
                f"micro_batch_size={self.micro_batch_size} does not divide global_batch_size="
                f"{self.global_batch_size} / dp={self.dp} = {per_rank:g}; {self._batch_advice()}"
            )
        check_schedule(self.schedule, self.pp, self.num_micro_batches, self.vpp)
        if self.offload.moves("parameters") and not self.shards_parameters:
            raise InputError(
                f"offload=parameters with zero={self.zero}: only fully sharded layers are fetched when they are "
                "needed; use zero=3 or hsdp"
            )
        if self.sequence_parallel and self.tp == 1:
            raise InputError("sequence_parallel needs tp above 1; it splits tokens over the tensor-parallel ranks")
        if self.zero == "2" and self.pp > 1:
            raise UnsupportedError(
                f"zero=2 with pp={self.pp}: gradients are sharded after each micro-batch, which no framework "
                "combines with a pipeline; use zero=1"
            )
        self._check_context()
        if (self.dp * self.cp * self.tp) % (self.ep * self.etp):
            raise InputError(
                f"ep={self.ep} x etp={self.etp} does not divide the {self.dp * self.cp * self.tp} ranks of a pipeline "
                f"stage (tp={self.tp} x cp={self.cp} x dp={self.dp})"
            )
        if self.hsdp_shard and (self.zero not in ("1", "hsdp") or (self.dp * self.cp) % self.hsdp_shard):
            raise InputError(
                f"hsdp_shard={self.hsdp_shard} needs zero=hsdp or zero=1 and must divide dp x cp = {self.dp * self.cp}"
            )

    def _check_context(self) -> None:
        if self.cp == 1 and self.cp_comm_type != "p2p":
            raise InputError(f"cp_comm_type={self.cp_comm_type} needs cp above 1; leave it out or use a larger cp")
        if self.cp_comm_type != "a2a+p2p":
            if self.cp_a2a:
                raise InputError(
                    f"cp_a2a={self.cp_a2a} with cp_comm_type={self.cp_comm_type}: only a2a+p2p has two levels"
                )
            return
        inner = [n for n in range(2, self.cp) if self.cp % n == 0]
        if self.cp_a2a not in inner:
            advice = f"use {' or '.join(map(str, inner))}" if inner else "use a2a or p2p, or a larger cp"
            raise InputError(
                f"cp_a2a={self.cp_a2a}: a2a+p2p splits cp={self.cp} into two levels, ranks that trade tokens for heads "
                f"and rings over them; {advice}"
            )

    def _batch_advice(self) -> str:
        if self.global_batch_size % self.dp:
            return f"dp={self.dp} does not divide the global batch either; choose another dp or batch"
        share = self.global_batch_size // self.dp
        divisors = [str(n) for n in range(1, min(share, 64) + 1) if share % n == 0]
        return f"use {', '.join(divisors[:-1])} or {divisors[-1]}" if len(divisors) > 1 else f"use {divisors[0]}"

    @property
    def num_gpus(self) -> int:
        """Product of the degrees."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per data-parallel rank and step."""
        return self.global_batch_size // (self.dp * self.micro_batch_size)

    @property
    def cp_heads(self) -> int:
        """Context-parallel ranks that trade tokens for heads."""
        return self.cp if self.cp_comm_type == "a2a" else max(1, self.cp_a2a)

    @property
    def pipeline(self) -> Schedule:
        """What is particular about the schedule."""
        return SCHEDULES[self.schedule]

    @property
    def shards_parameters(self) -> bool:
        """ZeRO stage 3, also inside HSDP groups."""
        return self.zero in ("3", "hsdp")

    def layout(self, seq_len: int, prefix_len: int = 0, vocab_multiple: int = 1, routing: Routing = BALANCED) -> Layout:
        """Axis lengths of one micro-batch on one rank."""
        return Layout(
            batch=self.micro_batch_size,
            seq_len=seq_len,
            tp=self.tp,
            cp=self.cp,
            cp_heads=self.cp_heads,
            cp_gathers=self.cp_comm_type == "all_gather",
            ep=self.ep,
            etp=self.etp,
            sequence_parallel=self.sequence_parallel,
            prefix_len=prefix_len,
            vocab_multiple=vocab_multiple,
            routing=routing,
        )

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}"]
        if self.vpp > 1:
            parts.append(f"vpp={self.vpp}")
        if self.cp > 1:
            parts.append(f"cp={self.cp}")
        if self.cp_comm_type != "p2p":
            inner = f" cp_a2a={self.cp_a2a}" if self.cp_a2a else ""
            parts.append(f"cp_comm_type={self.cp_comm_type}{inner}")
        if self.ep > 1:
            parts.append(f"ep={self.ep}")
        if self.etp > 1:
            parts.append(f"etp={self.etp}")
        parts += [f"dp={self.dp}", f"zero={self.zero}", f"mbs={self.micro_batch_size}", f"recompute={self.recompute}"]
        if self.sequence_parallel:
            parts.append("sp")
        if self.uneven_layers:
            parts.append("uneven")
        if self.offload.anything:
            parts.append(f"offload={self.offload}")
        return " ".join(parts)


@lru_cache(maxsize=4096)
def even_split(num_layers: int, chunks: int) -> tuple[int, ...] | None:
    """Layers of each model chunk in model order, or None where they do not split.

    Equal chunks where they divide. Otherwise the embedding, the head or both count as a layer, as Megatron-LM's
    ``account-for-embedding-in-pipeline-split`` and ``account-for-loss-in-pipeline-split`` do: the last, or the first
    and the last chunk have one layer fewer.

    >>> even_split(80, 4), even_split(126, 16)[0], sum(even_split(126, 16)), even_split(80, 7)
    ((20, 20, 20, 20), 7, 126, None)
    """
    if not 1 <= chunks <= num_layers:
        return None
    if num_layers % chunks == 0:
        return (num_layers // chunks,) * chunks
    for extra in (1, 2):
        size, rest = divmod(num_layers + extra, chunks)
        if rest == 0 and size > 1:
            first = size - 1 if extra == 2 else size
            return (first, *(size,) * (chunks - 2), size - 1)
    return None


def split_layers(num_layers: int, chunks: int, uneven: bool = False) -> tuple[int, ...]:
    """The same, or an error that says which numbers of chunks would do.

    ``uneven`` deals layers that do not split out all the same: chunks are filled from the front, as DeepSpeed's
    balanced partition does, or the first ones get a layer more where the last would stay empty. One or two chunks more
    than layers hold the head, or the embedding and the head, alone.

    >>> split_layers(61, 16, uneven=True)[-2:], split_layers(9, 7, uneven=True)
    ((4, 1), (2, 2, 1, 1, 1, 1, 1))
    >>> split_layers(6, 8, uneven=True)
    (0, 1, 1, 1, 1, 1, 1, 0)
    """
    split = even_split(num_layers, chunks)
    if split is not None:
        return split
    if uneven and chunks <= num_layers:
        size = -(-num_layers // chunks)
        last = num_layers - size * (chunks - 1)
        if last > 0:
            return (*(size,) * (chunks - 1), last)
        longer = num_layers % chunks
        return (size,) * longer + (size - 1,) * (chunks - longer)
    if uneven and chunks <= num_layers + 2:
        # The head, and then the embedding, have a chunk of their own.
        return (*(0,) * (chunks - num_layers - 1), *(1,) * num_layers, 0)
    if chunks > num_layers:
        raise InputError(f"pp x vpp = {chunks} chunks, but the model has {num_layers} layers; use fewer chunks")
    near = sorted((n for n in range(1, num_layers + 1) if even_split(num_layers, n)), key=lambda n: abs(n - chunks))[:4]
    raise InputError(
        f"{num_layers} layers do not split into pp x vpp = {chunks} chunks, not even with the embedding and the head "
        f"counted as layers; {', '.join(map(str, sorted(near)))} would"
    )


def check_plan(model: Model, plan: Plan, seq_len: int) -> None:
    """Refuse a plan whose degrees do not fit the model.

    Raises
    ------
    InputError
        Naming the two numbers that do not fit, and what would.
    """
    spec = model.spec
    moe: MoESpec | None = None
    blocks = dict.fromkeys((*spec.decoder.layers, *(spec.encoder.layers if spec.encoder else ())))
    for block in blocks:
        if isinstance(block.mixer, AttentionSpec):
            _check_heads(block.mixer, plan.tp)
        elif isinstance(block.mixer, MambaSpec):
            _divides("tp", plan.tp, "the state-space channels", block.mixer.inner_size)
            if plan.cp > 1:
                raise UnsupportedError(f"cp={plan.cp}: context parallelism of a state-space mixer is not modelled")
        if isinstance(block.mlp, MoESpec):
            moe = block.mlp
            _divides("ep", plan.ep, "num_experts", moe.num_experts)
            _divides("etp", plan.etp, "the experts' intermediate_size", moe.expert.intermediate_size)
        elif block.mlp is not None:
            _divides("tp", plan.tp, "intermediate_size", block.mlp.intermediate_size)
    if moe is None and (plan.ep > 1 or plan.etp > 1):
        raise InputError(f"ep={plan.ep} etp={plan.etp}: {spec.name} has no experts; use ep=1 and etp=1")
    if moe is not None and plan.tp > 1 and not plan.sequence_parallel:
        raise UnsupportedError(
            f"tp={plan.tp} without sequence_parallel in a mixture of experts would send every token tp times; "
            "switch sequence parallelism on"
        )
    cut = cut_inside_a_block(model, plan.tp, plan.etp) if plan.tp > 1 or plan.etp > 1 else ""
    if cut:
        raise InputError(f"tp={plan.tp} {cut}; use a smaller tp or smaller blocks")
    for attention in spec.attentions:
        fault = heads_fault(attention, plan.tp, plan.cp_heads)
        if fault:
            given = f"cp_a2a={plan.cp_a2a}" if plan.cp_a2a else f"cp={plan.cp} with cp_comm_type={plan.cp_comm_type}"
            raise InputError(f"{given}: {fault}")
    if seq_len % plan.cp:
        raise InputError(f"cp={plan.cp} does not divide seq_len={seq_len}")
    if plan.sequence_parallel and seq_len % (plan.cp * plan.tp):
        raise InputError(f"tp={plan.tp} x cp={plan.cp} does not divide seq_len={seq_len} (sequence parallel)")
    if plan.uneven_layers and plan.pp > spec.num_hidden_layers:
        raise InputError(f"pp={plan.pp} stages, but the model has {spec.num_hidden_layers} layers; use a smaller pp")
    split_layers(spec.num_hidden_layers, plan.pp * plan.vpp, plan.uneven_layers)


def check_virtual_tokens(model: Model, seq_len: int) -> None:
    """Refuse learned tokens that do not fit into the context beside the sequence.

    Raises
    ------
    InputError
        Naming the sequence that would fit.
    """
    virtual = model.method.context_tokens if model.method else 0
    context = model.spec.context_length
    if virtual and context is not None and seq_len + virtual > context:
        raise InputError(
            f"seq_len={seq_len} and virtual_tokens={virtual} exceed the context of {model.spec.name}, "
            f"{context} tokens; use seq_len={context - virtual} or less"
        )


def cut_inside_a_block(model: Model, tp: int, etp: int = 1) -> str:
    """What tensor parallelism would do to a quantised weight inside one of its blocks; "" where it does not.

    The elements of a block share their scale. A matrix is stored row by row, one row for each output: tensor
    parallelism over the outputs leaves whole rows, over the inputs it cuts every row.
    """
    layout = Layout(tp=tp, etp=etp)
    for part, _ in model.graph.parts:
        for weight in part.weights:
            if weight.storage is None or len(weight.axes) < 2:
                continue
            columns, piece = weight.axes[-2].size, layout.size(weight.axes[-2])
            rows = layout.size(weight.axes[-1])
            block = weight.storage.block
            if (piece < columns and piece % block) or (piece * rows) % block:
                return (
                    f"cuts {weight.name} ({weight.storage.name} in blocks of {block}) into pieces of {piece} x {rows}, "
                    "not on block borders"
                )
    return ""


def _check_heads(attention: AttentionSpec, tp: int) -> None:
    _divides("tp", tp, "num_attention_heads", attention.num_attention_heads)
    kv_heads = attention.num_key_value_heads
    if attention.latent is None and kv_heads % tp and tp % kv_heads:
        raise InputError(
            f"tp={tp} and num_key_value_heads={kv_heads}: one must divide the other (heads are split or replicated)"
        )


def heads_fault(attention: AttentionSpec, tp: int, cp_heads: int) -> str:
    """Why ranks cannot trade tokens for heads; "" where they can.

    Key-value heads that are fewer than the ranks are repeated, as by tensor parallelism (DeepSpeed Ulysses).
    """
    heads = attention.num_attention_heads // tp
    if heads % cp_heads:
        allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        return f"a tensor-parallel rank has {heads} attention heads; use {' or '.join(allowed)}"
    kv_heads = heads if attention.latent is not None else max(1, attention.num_key_value_heads // tp)
    if kv_heads % cp_heads and cp_heads % kv_heads:
        return (
            f"a tensor-parallel rank has {kv_heads} key-value heads, and one number must divide the other (heads are "
            "split or repeated)"
        )
    return ""


def inner_degree(attentions: Iterable[AttentionSpec], tp: int, cp: int, gpus_per_domain: int) -> int:
    """The ranks that trade tokens for heads where nobody says how many: the most that stay inside a scale-up domain.

    0 where context parallelism cannot have two levels.
    """
    every = tuple(attentions)
    reach = max(2, gpus_per_domain // tp)
    able = [n for n in range(2, cp) if cp % n == 0 and not any(heads_fault(one, tp, n) for one in every)]
    near = [n for n in able if n <= reach]
    return max(near, default=min(able, default=0))


def _divides(name: str, degree: int, what: str, size: int) -> None:
    if size % degree:
        allowed = [str(n) for n in range(1, 129) if size % n == 0]
        advice = f"{', '.join(allowed[:-1])} or {allowed[-1]}" if len(allowed) > 1 else "1"
        raise InputError(f"{name}={degree} does not divide {what}={size}; use {advice}")
