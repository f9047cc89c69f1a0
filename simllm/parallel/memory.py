"""Memory of each pipeline rank by kind: states, activations in flight, and what is at work at the peak.

The peak of a rank is its states, what the micro-batches in flight keep, and the larger of two moments: the loss (logits
and their gradients), or the first layer of a backward pass (a recomputed layer and the gradients around one operator).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from simllm.models.activations import Recompute, saved_bytes
from simllm.models.graph import Graph, Implementation, Layout, Tensor
from simllm.models.work import Gemm, GroupedGemm
from simllm.parallel.offload import OFFLOADED
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import Table, held_peak, in_flight_chunks, stage_of
from simllm.parallel.stages import Stage, block_weights, stage_moments, stage_weights
from simllm.parallel.states import StateBytes

__all__ = [
    "MEMORY_KINDS",
    "Held",
    "StageMemory",
    "held_along",
    "shard_degrees",
    "stage_memory",
    "weight_gradient_bytes",
]

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "working", "gathered", "buffers", "context")


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Peak memory of one rank of a pipeline stage.

    Attributes
    ----------
    rank : int
    by_kind : dict of str to float
        Bytes: parameters, gradients, optimizer, activations (kept for the backward pass), working (at the peak's
        moment), gathered (parameters of layers at work under full sharding), buffers (of communication), context
        (outside the allocator).
    in_flight : float
        Micro-batches whose activations are held, as a fraction of the rank's layers.
    moment : str
        What is happening at the peak.
    host : dict of str to float
        Bytes that the rank keeps in the host's memory, and under names with ``:nvme`` on its drives.
    """

    rank: int
    by_kind: dict[str, float]
    in_flight: float
    moment: str
    host: dict[str, float] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak: the sum of the kinds."""
        return sum(self.by_kind.values())

    @property
    def views(self) -> dict[str, float]:
        """The peak as different tools show it.

        ``max_allocated``: `torch.cuda.max_memory_allocated`, tensors only. ``max_reserved``: with what the allocator
        holds back for later; published reserved peaks are predicted as well without any such slack, so none is added.
        ``nvidia_smi``: with the CUDA context and libraries.
        """
        tensors = self.peak_bytes - self.by_kind["context"]
        return {"max_allocated": tensors, "max_reserved": tensors, "nvidia_smi": self.peak_bytes}

    @property
    def state_bytes(self) -> float:
        """Bytes that no recomputation or smaller micro-batch frees."""
        return self.peak_bytes - self.by_kind["activations"] - self.by_kind["working"]


def shard_degrees(plan: Plan, hsdp_shard: int) -> tuple[int, int]:
    """Ranks over which data parallelism shards dense and expert states."""
    dense = plan.dp * plan.cp
    expert = dense * plan.tp // (plan.ep * plan.etp)
    if plan.zero == "hsdp" or plan.hsdp_shard:
        return hsdp_shard, max(1, min(expert, hsdp_shard))
    return dense, expert


def kept_bytes(graph: Graph, layout: Layout, impl: Implementation, policy: Recompute) -> float:
    """Bytes an average layer keeps per micro-batch: every n-th layer is recomputed, the others keep everything."""
    kept = saved_bytes(graph, layout, impl, policy)
    if policy.every == 1:
        return kept
    return kept / policy.every + saved_bytes(graph, layout, impl) * (1 - 1 / policy.every)


@lru_cache(maxsize=1 << 16)
def gradient_workspace(graph: Graph, layout: Layout, impl: Implementation) -> float:
    """Bytes of the gradients around the widest operator: those of its inputs and outputs."""
    return max(
        (
            sum(layout.elements(t) * impl.bytes_of(t) for t in (*operator.inputs, *operator.outputs))
            for operator in graph.operators
        ),
        default=0.0,
    )


@dataclass(frozen=True, slots=True)
class StageActivations:
    """Bytes that one micro-batch keeps on a rank, those of the head apart, and what is at work at the peak."""

    per_micro_batch: float
    head: float
    working: float
    moment: str


@lru_cache(maxsize=1 << 16)
def stage_activations(stage: Stage, layout: Layout, impl: Implementation, policy: Recompute) -> StageActivations:
    """What the blocks of a rank keep from forward to backward for one micro-batch."""
    kept = sum(times * kept_bytes(graph, layout, impl, policy) for graph, times in stage.layers)
    head, working, moment = 0.0, 0.0, "backward of the first layer"
    for graph, _ in stage.layers:
        again = saved_bytes(graph, layout, impl) - saved_bytes(graph, layout, impl, policy)
        working = max(working, again + gradient_workspace(graph, layout, impl))
    for graph in stage.extras:
        saved = saved_bytes(graph, layout, impl)
        if not (stage.last and graph is stage.extras[-1]):
            kept += saved
            continue
        head = saved
        loss = saved + gradient_workspace(graph, layout, impl) - _logits_bytes(graph, layout, impl)
        if loss > working:
            working, moment = loss, "loss"
    return StageActivations(kept, head, working, moment)


@lru_cache(maxsize=1 << 16)
def _block_weight_gradient_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    tensors: dict[tuple[str, str], Tensor] = {}
    for operator in graph.operators:
        if any(isinstance(work, Gemm | GroupedGemm) for work in operator.backward_weight(layout, impl)):
            tensors |= {("value", tensor.name): tensor for tensor in operator.inputs[:1]}
            tensors |= {("gradient", tensor.name): tensor for tensor in operator.outputs}
    return sum(layout.elements(tensor) for tensor in tensors.values()) * impl.activation_bytes


def weight_gradient_bytes(stage: Stage, layout: Layout, impl: Implementation) -> float:
    """Bytes that one micro-batch holds between its input gradient and its weight gradient.

    The inputs of the matrix products, and the gradients of their outputs (arXiv:2401.10241, section 2.2: 32 s b h for
    a layer of GPT), the head's included.
    """
    layers = sum(times * _block_weight_gradient_bytes(graph, layout, impl) for graph, times in stage.layers)
    return layers + sum(_block_weight_gradient_bytes(graph, layout, impl) for graph in stage.extras)


@dataclass(frozen=True, slots=True)
class Held:
    """The most that a rank holds of its micro-batches in flight: bytes, micro-batches, and when."""

    size_bytes: float
    micro_batches: float
    moment: str


_ACTION_WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


@lru_cache(maxsize=1 << 14)
def held_along(
    table: Table, rank: int, stages: tuple[Stage, ...], layout: Layout, impl: Implementation, policy: Recompute
) -> Held:
    """What a rank holds at the fullest moment of an action table.

    Parameters
    ----------
    table : Table
    rank : int
    stages : tuple of Stage
        Every chunk by itself, in model order.
    layout : Layout
    impl : Implementation
    policy : Recompute
    """
    own = [stages[stage_of(table.placement, len(table.rows), rank, chunk)] for chunk in range(table.chunks)]
    kept = [stage_activations(stage, layout, impl, policy).per_micro_batch for stage in own]
    pending = [weight_gradient_bytes(stage, layout, impl) for stage in own]
    actions = table.actions(rank)
    most, at = held_peak(actions, kept, pending)
    each = [1 / table.chunks] * table.chunks
    moment = f"{_ACTION_WORDS[at.kind]} of micro-batch {at.micro_batch}, chunk {at.chunk}"
    return Held(most, held_peak(actions, each, each)[0], moment)


def stage_memory(
    stage: Stage,
    plan: Plan,
    layout: Layout,
    impl: Implementation,
    states: StateBytes,
    optimizer: str,
    context_bytes: float,
    hsdp_shard: int = 1,
    held: Held | None = None,
) -> StageMemory:
    """Peak memory of one rank of a stage.

    Parameters
    ----------
    stage : Stage
    plan : Plan
    layout : Layout
        Of one micro-batch on one rank.
    impl : Implementation
    states : StateBytes
    optimizer : str
    context_bytes : float
        Device memory outside the framework's allocator.
    hsdp_shard : int
        Ranks of an HSDP group.
    held : Held, optional
        What the action table says of the micro-batches in flight; needed where a schedule has no closed form.

    Returns
    -------
    StageMemory
    """
    weights = stage_weights(stage, layout, plan.pp)
    moments = stage_moments(stage, layout, plan.pp, optimizer, states.moment_element)
    degrees = shard_degrees(plan, hsdp_shard)

    def kept(of: tuple[float, float], per_parameter: float, sharded: bool) -> float:
        by = degrees if sharded else (1, 1)
        return per_parameter * (of[0] / by[0] + of[1] / by[1])

    full = plan.shards_parameters
    by_kind = {
        "parameters": kept(weights, states.parameter, full),
        "gradients": kept(weights, states.gradient, full or plan.zero == "2"),
        "optimizer": kept(weights, states.master, plan.zero != "0") + kept(moments, 1, plan.zero != "0"),
    }
    m = plan.num_micro_batches
    use = stage_activations(stage, layout, impl, plan.recompute)
    # The head keeps its tensors for one micro-batch at a time, except where all forwards come first.
    forwards_first = plan.schedule in ("gpipe", "looped-bfs") or (plan.schedule == "interleaved" and m == plan.pp)
    heads = m - 1 if forwards_first else 0
    if held is None:
        in_flight = in_flight_chunks(plan.schedule, plan.pp, m, stage.rank, plan.vpp) / plan.vpp
        held = Held(use.per_micro_batch * in_flight, in_flight, "")
    by_kind |= {
        "activations": held.size_bytes + use.head * heads,
        "working": use.working,
        "gathered": _gathered_bytes(stage, layout, states) if full else 0.0,
        "buffers": min(states.buckets, sum(weights) * (states.gradient_on_wire + states.parameter)),
        "context": context_bytes,
    }
    moment = f"{use.moment}, after the {held.moment}" if held.moment else use.moment
    host = _offloaded(stage, plan, layout, states, by_kind, use) if plan.offload.anything else {}
    return StageMemory(rank=stage.rank, by_kind=by_kind, in_flight=held.micro_batches, moment=moment, host=host)


def _offloaded(
    stage: Stage,
    plan: Plan,
    layout: Layout,
    states: StateBytes,
    by_kind: dict[str, float],
    use: StageActivations,
) -> dict[str, float]:
    """Take from the device what is offloaded, but for what passes through; returns what the host keeps.

    Of activations the layer at work and the one on its way stay, of gradients those of the largest layer. The host
    keeps gradients as they were sent.
    """
    layer = max((sum(block_weights(graph, layout)) for graph, _ in stage.layers), default=0)
    stays = {
        "activations": 2 * use.per_micro_batch / max(1, stage.num_layers),
        "gradients": layer * states.gradient_on_wire,
    }
    host = {}
    for name in OFFLOADED:
        if plan.offload.moves(name):
            kept = min(by_kind[name], stays.get(name, 0.0))
            moved = by_kind[name] - (kept if name == "activations" else 0.0)
            if name == "gradients":
                moved *= states.gradient_on_wire / states.gradient
            host[f"{name}:nvme" if name in plan.offload.to_nvme else name] = moved
            by_kind[name] = kept
    return host


def _logits_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    # The stack's bytes per logit already hold the logits' gradient: it is not a workspace of its own.
    return sum(layout.elements(t) * impl.bytes_of(t) for t in graph.operators[-1].inputs)


def _gathered_bytes(stage: Stage, layout: Layout, states: StateBytes) -> float:
    """Full sharding: the layer at work, the one fetched ahead, one layer's gradient, and what is outside the layers."""
    largest = max(sum(block_weights(graph, layout)) for graph, _ in stage.layers)
    outside = sum(sum(block_weights(graph, layout)) for graph in stage.extras)
    return states.gathered * (3 * largest + outside)
