"""Memory of each pipeline rank by kind: states, activations in flight, and what is at work at the peak.

The peak of a rank is its states, what the micro-batches in flight keep, and the larger of two moments: the loss (logits
and their gradients), or the first layer of a backward pass (a recomputed layer and the gradients around one operator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from operator import add

from simllm.elementwise import Real, larger, smaller
from simllm.models.activations import Recompute, saved_bytes
from simllm.models.graph import Graph, Implementation, Layout, Operator, Tensor
from simllm.models.work import Gemm, GroupedGemm
from simllm.parallel.offload import STATES
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import Table, held_peak, in_flight_chunks, stage_of
from simllm.parallel.stages import (
    Stage,
    block_frozen_bytes,
    block_weights,
    stage_frozen_bytes,
    stage_moments,
    stage_weights,
)
from simllm.parallel.states import StateBytes

__all__ = [
    "MEMORY_KINDS",
    "Held",
    "StageMemory",
    "head_bytes",
    "heads_in_flight",
    "held_along",
    "kept_bytes",
    "layer_peak_bytes",
    "loss_peak_bytes",
    "micro_batch_bytes",
    "resident_activations",
    "shard_degrees",
    "stage_kept_bytes",
    "stage_memory",
    "state_memory",
    "take_states",
    "weight_gradient_bytes",
    "working_bytes",
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
    """Bytes at work around the widest operator of the backward pass: the gradients of its inputs and outputs.

    A product with a quantised weight holds it expanded to the compute precision; attention split by context parallelism
    the keys of other ranks and other layouts of its tensors.
    """
    return max(
        (
            sum(layout.elements(t) * impl.bytes_of(t) for t in (*operator.inputs, *operator.outputs))
            + expanded_bytes(operator, layout, impl)
            + operator.buffers(layout, impl)
            for operator in graph.operators
            if graph.runs_backward(operator)
        ),
        default=0.0,
    )


def expanded_bytes(operator: Operator, layout: Layout, impl: Implementation) -> float:
    """Bytes of the largest quantised weight of an operator in the compute precision: they are expanded one by one."""
    stored = (layout.weight_elements(weight) for weight in operator.weights if weight.storage is not None)
    return max(stored, default=0) * impl.activation_bytes


def layer_peak_bytes(graph: Graph, layout: Layout, impl: Implementation, policy: Recompute) -> float:
    """Bytes at work in the backward pass of a layer: what was recomputed, and the gradients around one operator."""
    again = saved_bytes(graph, layout, impl) - saved_bytes(graph, layout, impl, policy)
    return again + gradient_workspace(graph, layout, impl)


def loss_peak_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    """Bytes at work in the loss: what the head keeps, and gradients around one operator."""
    logits = _logits_bytes(graph, layout, impl)
    return saved_bytes(graph, layout, impl) + gradient_workspace(graph, layout, impl) - logits


def micro_batch_bytes(stage: Stage, kept: Callable[[Graph, bool], Real]) -> Real | float:
    """Bytes that one micro-batch keeps on a rank for its backward pass, those of the head apart.

    Parameters
    ----------
    stage : Stage
    kept : callable
        ``(graph, whether it is a layer) -> bytes`` that a block keeps.
    """
    head = stage.extras[-1] if stage.last else None
    parts = [kept(graph, True) * times for graph, times in stage.layers]
    parts += [kept(graph, False) for graph in stage.extras if graph is not head]
    return reduce(add, parts) if parts else 0.0


def head_bytes(stage: Stage, kept: Callable[[Graph, bool], Real]) -> Real | float:
    """Bytes that one micro-batch keeps in the head, where the rank holds it."""
    return kept(stage.extras[-1], False) if stage.last else 0.0


@lru_cache(maxsize=1 << 16)
def stage_kept_bytes(stage: Stage, layout: Layout, impl: Implementation, policy: Recompute) -> float:
    """`micro_batch_bytes` of one plan."""

    def kept(graph: Graph, is_layer: bool) -> float:
        return kept_bytes(graph, layout, impl, policy) if is_layer else saved_bytes(graph, layout, impl)

    return micro_batch_bytes(stage, kept)


def working_bytes(
    stage: Stage, layer_peak: Callable[[Graph], Real], loss_peak: Callable[[Graph], Real]
) -> Real | float:
    """Bytes at work at the peak of a rank: the largest layer's backward pass or, on the last rank, the loss."""
    peaks = [layer_peak(graph) for graph, _ in stage.layers]
    if stage.last:
        peaks.append(loss_peak(stage.extras[-1]))
    return reduce(larger, peaks) if peaks else 0.0


def state_memory(
    stage: Stage, plan: Plan, layout: Layout, states: StateBytes, optimizer: str, hsdp_shard: int = 1
) -> dict[str, float]:
    """Bytes of a rank that depend neither on its micro-batches nor on recomputation, by kind."""
    weights = stage_weights(stage, layout, plan.pp)
    frozen = stage_frozen_bytes(stage, layout, plan.pp, states.gathered)
    moments = stage_moments(stage, layout, plan.pp, optimizer, states.moment_element)
    degrees = shard_degrees(plan, hsdp_shard)

    def kept(of: tuple[float, float], per_parameter: float, sharded: bool) -> float:
        by = degrees if sharded else (1, 1)
        return per_parameter * (of[0] / by[0] + of[1] / by[1])

    full = plan.shards_parameters
    return {
        "parameters": kept(weights, states.parameter, full) + kept(frozen, 1, full),
        "gradients": kept(weights, states.gradient, full or plan.zero == "2"),
        "optimizer": kept(weights, states.master, plan.zero != "0") + kept(moments, 1, plan.zero != "0"),
        "gathered": _gathered_bytes(stage, layout, states) if full else 0.0,
        "buffers": min(states.buckets, sum(weights) * (states.gradient_on_wire + states.parameter)),
    }


def heads_in_flight(schedule: str, num_micro_batches: int) -> int:
    """Micro-batches whose head keeps its tensors beside those at work: none, except where all forwards come first."""
    return num_micro_batches - 1 if schedule in ("gpipe", "looped-bfs") else 0


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
    kept = [stage_kept_bytes(stage, layout, impl, policy) for stage in own]
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
    m, policy = plan.num_micro_batches, plan.recompute
    if held is None:
        in_flight = in_flight_chunks(plan.schedule, plan.pp, m, stage.rank, plan.vpp) / plan.vpp
        held = Held(stage_kept_bytes(stage, layout, impl, policy) * in_flight, in_flight, "")

    def layer_peak(graph: Graph) -> float:
        return layer_peak_bytes(graph, layout, impl, policy)

    def loss_peak(graph: Graph) -> float:
        return loss_peak_bytes(graph, layout, impl)

    working = working_bytes(stage, layer_peak, loss_peak)
    at_loss = stage.last and all(layer_peak(graph) < working for graph, _ in stage.layers)
    head = head_bytes(stage, lambda graph, _: saved_bytes(graph, layout, impl))
    fixed = state_memory(stage, plan, layout, states, optimizer, hsdp_shard)
    by_kind = {kind: fixed[kind] for kind in ("parameters", "gradients", "optimizer")} | {
        "activations": held.size_bytes + head * heads_in_flight(plan.schedule, m),
        "working": working,
        "gathered": fixed["gathered"],
        "buffers": fixed["buffers"],
        "context": context_bytes,
    }
    moment = "loss" if at_loss else "backward of the first layer"
    moment = f"{moment}, after the {held.moment}" if held.moment else moment
    host: dict[str, float] = {}
    if plan.offload.anything:
        host = take_states(stage, plan, layout, states, by_kind)
    if plan.offload.moves("activations"):
        stays = resident_activations(stage, by_kind["activations"], stage_kept_bytes(stage, layout, impl, policy))
        host["activations"] = by_kind["activations"] - stays
        by_kind["activations"] = stays
    return StageMemory(rank=stage.rank, by_kind=by_kind, in_flight=held.micro_batches, moment=moment, host=host)


def take_states(
    stage: Stage, plan: Plan, layout: Layout, states: StateBytes, by_kind: dict[str, float]
) -> dict[str, float]:
    """Take from the device the states that are offloaded, but for what passes through; returns what the host keeps.

    Of gradients those of the largest layer stay. The host keeps gradients as they were sent.
    """
    layer = max((sum(block_weights(graph, layout)) for graph, _ in stage.layers), default=0)
    host = {}
    for name in STATES:
        if plan.offload.moves(name):
            moved = by_kind[name]
            if name == "gradients":
                moved *= states.gradient_on_wire / states.gradient
            host[f"{name}:nvme" if name in plan.offload.to_nvme else name] = moved
            by_kind[name] = min(by_kind[name], layer * states.gradient_on_wire if name == "gradients" else 0.0)
    return host


def resident_activations(stage: Stage, held: Real, per_micro_batch: Real | float) -> Real:
    """Bytes of activations that stay on the device when they are offloaded: the layer at work, the one on its way."""
    return smaller(held, per_micro_batch * (2 / max(1, stage.num_layers)))


def _logits_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    # The stack's bytes per logit already hold the logits' gradient: it is not a workspace of its own.
    return sum(layout.elements(t) * impl.bytes_of(t) for t in graph.operators[-1].inputs)


def _gathered_bytes(stage: Stage, layout: Layout, states: StateBytes) -> float:
    """Full sharding: the layer at work, the one fetched ahead, one layer's gradient, and what is outside the layers."""
    largest = max((sum(block_weights(graph, layout)) for graph, _ in stage.layers), default=0)
    outside = sum(sum(block_weights(graph, layout)) for graph in stage.extras)
    # Frozen weights are gathered as they are stored, and have no gradient.
    frozen = max((sum(block_frozen_bytes(graph, layout, states.gathered)) for graph, _ in stage.layers), default=0)
    frozen_outside = sum(sum(block_frozen_bytes(graph, layout, states.gathered)) for graph in stage.extras)
    return states.gathered * (3 * largest + outside) + 2 * frozen + frozen_outside
