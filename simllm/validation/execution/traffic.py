"""Collectives of a rank: how often, over which ranks, how many bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from simllm.parallel.communication import block_collectives
from simllm.parallel.gradients import tied_elements
from simllm.validation.execution.flops import rerun
from simllm.validation.execution.rank_view import RankView
from simllm.validation.execution.weights import Parameter, Unit, block_parameters

__all__ = ["Traffic", "traffic"]

#: (operation, global ranks) -> (calls, bytes)
Traffic = dict[tuple[str, tuple[int, ...]], tuple[int, int]]

Adder = Callable[..., None]

#: PyTorch's DistributedDataParallel: a first bucket of 1 MiB, then of 25 MiB (its documented bucket_cap_mb).
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20


def traffic(at: RankView) -> Traffic:
    """The collectives of a step."""
    calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def add(op: str, ranks: tuple[int, ...], size: float, times: int = 1) -> None:
        if len(ranks) > 1 and times:
            calls[op, ranks] += times
            sizes[op, ranks] += round(size * times)

    _block_traffic(at, add)
    _data_parallel_traffic(at, add)
    _pipeline_traffic(at, add)
    return {key: (calls[key], sizes[key]) for key in calls}


def _block_traffic(at: RankView, add: Adder) -> None:
    ranks = {"tp": at.groups.tp, "ep": at.groups.ep}
    for graph, policy in at.blocks:
        again_too, _ = rerun(at, graph, policy)
        for item in block_collectives(graph, at.layout, at.impl):
            again = item.phase == "forward" and item.operator in again_too
            add(item.op, ranks[item.group], item.size_bytes, item.count * at.m * (2 if again else 1))
    for unit in at.units:
        for parameter in unit.parameters:
            if parameter.partial:
                # In a pipeline FSDP2 adds up the micro-batches' gradients, in the precision that it reduces in.
                once = at.case.fully_sharded and at.plan.pp > 1
                element = 4 if once or at.plan.precision == "fp32" else 2
                add("all_reduce", at.groups.tp, parameter.elements * element, 1 if once else at.m)


def _data_parallel_traffic(at: RankView, add: Adder) -> None:
    plan, groups, states = at.plan, at.groups, at.case.states
    if plan.zero in ("2", "3", "hsdp"):
        for unit in at.units:
            _unit_traffic(at, unit, add)
    elif plan.dp > 1 and plan.tp == 1:
        for chunk in range(plan.vpp):
            dense = _dense_in_order(at, chunk)
            for size in _buckets(dense):
                add("all_reduce", groups.dp, size)
            if plan.zero == "1":
                for parameter in dense:
                    add("broadcast", groups.dp, parameter.elements * states.parameter)
    # Reduced by hand: one buffer for each model chunk.
    for chunk in range(plan.vpp) if plan.zero in ("0", "1") else ():
        if plan.dp > 1 and plan.tp > 1:
            dense_elements = sum(p.elements for p in _dense_in_order(at, chunk))
            add("all_reduce", groups.dp, dense_elements * states.gradient)
        own = [u for u in at.units if u.experts and at.chunk_of(u) == chunk] if at.experts_apart else []
        experts = sum(p.elements for u in own for p in u.parameters)
        add("all_reduce", groups.expert_dp, experts * states.gradient, int(experts > 0))


def _dense_in_order(at: RankView, chunk: int) -> list[Parameter]:
    """Parameters of a model chunk in the order of the forward pass, experts apart where other ranks share them."""
    keep = at.plan.pp > 1 and not at.stage.first
    head = [graph for graph in at.stage.extras if graph is at.graph.head]
    before = [graph for graph in at.stage.extras if graph not in head]
    blocks = [(graph, keep) for graph in before] if chunk == 0 else []
    blocks += [(graph, False) for _, graph in at.chunks[chunk]]
    blocks += [(graph, keep) for graph in head] if chunk == at.plan.vpp - 1 else []
    found = [p for graph, tied in blocks for p in block_parameters(graph, at.layout, tied)]
    return [p for p in found if not (at.experts_apart and p.expert)]


def _buckets(parameters: list[Parameter]) -> list[int]:
    """DistributedDataParallel's buckets: gradients in reverse order, a bucket closed once it is full."""
    buckets: list[int] = []
    size, limit = 0, _FIRST_BUCKET
    for parameter in reversed(parameters):
        size += parameter.elements * 4
        if size >= limit:
            buckets.append(size)
            size, limit = 0, _BUCKET
    return buckets + ([size] if size else [])


def _unit_traffic(at: RankView, unit: Unit, add: Adder) -> None:
    plan, states, groups = at.plan, at.case.states, at.groups
    ranks = at.shard_ranks(unit)
    if ranks == 1 and plan.zero != "hsdp":
        return
    group = groups.expert_dp if unit.experts else groups.hsdp_shard if plan.zero == "hsdp" else groups.dp
    elements = unit.gathered(ranks)
    gathers, reductions = _unit_calls(at, unit)
    add("all_gather", group, elements * states.gathered, gathers)
    add("reduce_scatter", group, elements * states.gradient_on_wire, reductions)
    if plan.zero == "hsdp" and not unit.experts:
        add("all_reduce", groups.hsdp_replicate, elements / ranks * states.gradient_on_wire, reductions)


def _unit_calls(at: RankView, unit: Unit) -> tuple[int, int]:
    """How often FSDP2 gathers and reduces a unit in a step.

    Outside a pipeline it is gathered for each forward and each backward pass. In a pipeline PyTorch keeps what a
    backward pass gathered until a forward pass frees it, and reduces once at the end.
    """
    kept = at.plan.zero == "2"
    if at.plan.pp == 1:
        return (at.m if kept else 2 * at.m), at.m
    gathers, there = 0, False
    for action in at.actions:
        if action.chunk != at.chunk_of(unit):
            continue
        gathers += not there
        there = kept or action.kind == "B"
    return gathers, 1


def _pipeline_traffic(at: RankView, add: Adder) -> None:
    plan = at.plan
    if plan.pp == 1:
        return
    size = at.layout.elements(at.graph.layers[-1].output) * at.impl.activation_bytes
    stages = at.case.stages(at.pp_rank)
    neighbours = [near for stage in stages for near in (stage - 1, stage + 1) if 0 <= near < plan.pp * plan.vpp]
    times = sum(near not in stages for near in neighbours) * at.m  # in a V some neighbours are on the same rank
    for op in ("send", "recv"):
        add(op, at.groups.pp, size, times)
    if tied_elements(at.graph, at.stage, at.layout):
        table = next(p for u in at.units for p in u.parameters if p.tied)
        root = next(u for u in at.units if table in u.parameters)
        stage = plan.tp * plan.dp
        inside = at.rank % stage
        ends = (inside, (plan.pp - 1) * stage + inside)
        add("all_reduce", ends, table.shard_of(at.shard_ranks(root), at.shard_rank(root)) * 4)
