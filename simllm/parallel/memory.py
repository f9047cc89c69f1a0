"""Memory of each pipeline rank by kind: states, activations in flight, and what is at work at the peak.

The peak of a rank is its states, what the micro-batches in flight keep, and the larger of two moments: the loss (logits
and their gradients), or the first layer of a backward pass (a recomputed layer and the gradients around one operator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce

from simllm.elementwise import Real, larger
from simllm.models.activations import Recompute, saved_bytes
from simllm.models.graph import Graph, Implementation, Layout
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import in_flight_chunks
from simllm.parallel.stages import Stage, block_weights, stage_moments, stage_weights
from simllm.parallel.states import StateBytes

__all__ = [
    "MEMORY_KINDS",
    "StageMemory",
    "activation_bytes",
    "heads_in_flight",
    "kept_bytes",
    "layer_peak_bytes",
    "loss_peak_bytes",
    "shard_degrees",
    "stage_memory",
    "state_memory",
    "working_bytes",
]

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "working", "gathered", "context")


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Peak memory of one rank of a pipeline stage.

    Attributes
    ----------
    rank : int
    by_kind : dict of str to float
        Bytes: parameters, gradients, optimizer, activations (kept for the backward pass), working (at the peak's
        moment), gathered (parameters of layers at work under full sharding), context (outside the allocator).
    in_flight : float
        Micro-batches whose activations are held, as a fraction of the rank's layers.
    moment : str
        What is happening at the peak.
    """

    rank: int
    by_kind: dict[str, float]
    in_flight: float
    moment: str

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak: the sum of the kinds."""
        return sum(self.by_kind.values())

    @property
    def state_bytes(self) -> float:
        """Bytes that no recomputation or smaller micro-batch frees."""
        return self.peak_bytes - self.by_kind["activations"] - self.by_kind["working"]


def shard_degrees(plan: Plan, hsdp_shard: int) -> tuple[int, int]:
    """Ranks over which data parallelism shards dense and expert states."""
    dense = plan.dp * plan.cp
    expert = dense * plan.tp // (plan.ep * plan.etp)
    if plan.zero == "hsdp":
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


def layer_peak_bytes(graph: Graph, layout: Layout, impl: Implementation, policy: Recompute) -> float:
    """Bytes at work in the backward pass of a layer: what was recomputed, and the gradients around one operator."""
    again = saved_bytes(graph, layout, impl) - saved_bytes(graph, layout, impl, policy)
    return again + gradient_workspace(graph, layout, impl)


def loss_peak_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    """Bytes at work in the loss: what the head keeps, and gradients around one operator."""
    logits = _logits_bytes(graph, layout, impl)
    return saved_bytes(graph, layout, impl) + gradient_workspace(graph, layout, impl) - logits


def activation_bytes(stage: Stage, kept: Callable[[Graph, bool], Real], in_flight: Real, heads_in_flight: Real) -> Real:
    """Bytes kept for the backward pass on a rank.

    Parameters
    ----------
    stage : Stage
    kept : callable
        ``(graph, whether it is a layer) -> bytes`` that a block keeps for one micro-batch.
    in_flight : float
        Micro-batches whose activations the rank holds.
    heads_in_flight : float
        Those whose head's activations it holds beside the ones at work.
    """
    head = stage.extras[-1] if stage.last else None
    total = sum((kept(graph, True) * times for graph, times in stage.layers), start=0.0)
    total = total + sum((kept(graph, False) for graph in stage.extras if graph is not head), start=0.0)
    held = total * in_flight
    return held if head is None else held + kept(head, False) * heads_in_flight


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
    moments = stage_moments(stage, layout, plan.pp, optimizer, states.moment_element)
    degrees = shard_degrees(plan, hsdp_shard)

    def kept(of: tuple[float, float], per_parameter: float, sharded: bool) -> float:
        by = degrees if sharded else (1, 1)
        return per_parameter * (of[0] / by[0] + of[1] / by[1])

    full = plan.shards_parameters
    return {
        "parameters": kept(weights, states.parameter, full),
        "gradients": kept(weights, states.gradient, full or plan.zero == "2"),
        "optimizer": kept(weights, states.master, plan.zero != "0") + kept(moments, 1, plan.zero != "0"),
        "gathered": _gathered_bytes(stage, layout, states) if full else 0.0,
    }


def heads_in_flight(schedule: str, chunks: int) -> int:
    """Micro-batches whose head keeps its tensors beside those at work: none, except where all forwards come first."""
    return chunks - 1 if schedule == "gpipe" else 0


def stage_memory(
    stage: Stage,
    plan: Plan,
    layout: Layout,
    impl: Implementation,
    states: StateBytes,
    optimizer: str,
    context_bytes: float,
    hsdp_shard: int = 1,
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

    Returns
    -------
    StageMemory
    """
    chunks = in_flight_chunks(plan.schedule, plan.pp, plan.num_micro_batches, stage.rank, plan.vpp)
    in_flight = chunks / plan.vpp
    policy = plan.recompute

    def kept(graph: Graph, is_layer: bool) -> float:
        return kept_bytes(graph, layout, impl, policy) if is_layer else saved_bytes(graph, layout, impl)

    def layer_peak(graph: Graph) -> float:
        return layer_peak_bytes(graph, layout, impl, policy)

    def loss_peak(graph: Graph) -> float:
        return loss_peak_bytes(graph, layout, impl)

    working = working_bytes(stage, layer_peak, loss_peak)
    at_loss = stage.last and all(layer_peak(graph) < working for graph, _ in stage.layers)
    fixed = state_memory(stage, plan, layout, states, optimizer, hsdp_shard)
    by_kind = {kind: fixed[kind] for kind in ("parameters", "gradients", "optimizer")} | {
        "activations": activation_bytes(stage, kept, in_flight, heads_in_flight(plan.schedule, chunks)),
        "working": working,
        "gathered": fixed["gathered"],
        "context": context_bytes,
    }
    moment = "loss" if at_loss else "backward of the first layer"
    return StageMemory(rank=stage.rank, by_kind=by_kind, in_flight=in_flight, moment=moment)


def _logits_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    # The stack's bytes per logit already hold the logits' gradient: it is not a workspace of its own.
    return sum(layout.elements(t) * impl.bytes_of(t) for t in graph.operators[-1].inputs)


def _gathered_bytes(stage: Stage, layout: Layout, states: StateBytes) -> float:
    """Full sharding: the layer at work, the one fetched ahead, one layer's gradient, and what is outside the layers."""
    largest = max((sum(block_weights(graph, layout)) for graph, _ in stage.layers), default=0)
    outside = sum(sum(block_weights(graph, layout)) for graph in stage.extras)
    return states.gathered * (3 * largest + outside)
