"""Memory of each pipeline rank by kind: states, activations in flight, and what is at work at the peak.

The peak of a rank is its states, what the micro-batches in flight keep, and the larger of two moments: the loss (logits
and their gradients), or the first layer of a backward pass (a recomputed layer and the gradients around one operator).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from simllm.models.activations import Recompute, saved_bytes
from simllm.models.graph import Graph, Implementation, Layout, Operator
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import in_flight_chunks
from simllm.parallel.stages import (
    Stage,
    block_frozen_bytes,
    block_weights,
    stage_frozen_bytes,
    stage_moments,
    stage_weights,
)
from simllm.parallel.states import StateBytes

__all__ = ["MEMORY_KINDS", "StageMemory", "shard_degrees", "stage_memory"]

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

    A product with a quantised weight holds it expanded to the compute precision.
    """
    return max(
        (
            sum(layout.elements(t) * impl.bytes_of(t) for t in (*operator.inputs, *operator.outputs))
            + expanded_bytes(operator, layout, impl)
            for operator in graph.operators
            if graph.runs_backward(operator)
        ),
        default=0.0,
    )


def expanded_bytes(operator: Operator, layout: Layout, impl: Implementation) -> float:
    """Bytes of the largest quantised weight of an operator in the compute precision: they are expanded one by one."""
    stored = (layout.weight_elements(weight) for weight in operator.weights if weight.storage is not None)
    return max(stored, default=0) * impl.activation_bytes


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
    weights = stage_weights(stage, layout, plan.pp)
    frozen = stage_frozen_bytes(stage, layout, plan.pp, states.gathered)
    moments = stage_moments(stage, layout, plan.pp, optimizer, states.moment_element)
    degrees = shard_degrees(plan, hsdp_shard)

    def kept(of: tuple[float, float], per_parameter: float, sharded: bool) -> float:
        by = degrees if sharded else (1, 1)
        return per_parameter * (of[0] / by[0] + of[1] / by[1])

    full = plan.shards_parameters
    by_kind = {
        "parameters": kept(weights, states.parameter, full) + kept(frozen, 1, full),
        "gradients": kept(weights, states.gradient, full or plan.zero == "2"),
        "optimizer": kept(weights, states.master, plan.zero != "0") + kept(moments, 1, plan.zero != "0"),
    }
    chunks = in_flight_chunks(plan.schedule, plan.pp, plan.num_micro_batches, stage.rank, plan.vpp)
    in_flight = chunks / plan.vpp
    use = stage_activations(stage, layout, impl, plan.recompute)
    # The head keeps its tensors for one micro-batch at a time, except where all forwards come first.
    heads = chunks - 1 if plan.schedule == "gpipe" else 0
    by_kind |= {
        "activations": use.per_micro_batch * in_flight + use.head * heads,
        "working": use.working,
        "gathered": _gathered_bytes(stage, layout, states) if full else 0.0,
        "context": context_bytes,
    }
    return StageMemory(rank=stage.rank, by_kind=by_kind, in_flight=in_flight, moment=use.moment)


def _logits_bytes(graph: Graph, layout: Layout, impl: Implementation) -> float:
    # The stack's bytes per logit already hold the logits' gradient: it is not a workspace of its own.
    return sum(layout.elements(t) * impl.bytes_of(t) for t in graph.operators[-1].inputs)


def _gathered_bytes(stage: Stage, layout: Layout, states: StateBytes) -> float:
    """Full sharding: the layer at work, the one fetched ahead, one layer's gradient, and what is outside the layers."""
    largest = max(sum(block_weights(graph, layout)) for graph, _ in stage.layers)
    outside = sum(sum(block_weights(graph, layout)) for graph in stage.extras)
    # Frozen weights are gathered as they are stored, and have no gradient.
    frozen = max(sum(block_frozen_bytes(graph, layout, states.gathered)) for graph, _ in stage.layers)
    frozen_outside = sum(sum(block_frozen_bytes(graph, layout, states.gathered)) for graph in stage.extras)
    return states.gathered * (3 * largest + outside) + 2 * frozen + frozen_outside
