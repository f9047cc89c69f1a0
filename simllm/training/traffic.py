"""What each group of ranks exchanges in one step: the same exchanges that the step's time is made of, added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simllm.network import price
from simllm.parallel.communication import block_collectives
from simllm.parallel.stages import block_weights, stage_weights
from simllm.training.composition import transfers_of
from simllm.training.step import Exchange, Step

__all__ = ["GroupTraffic", "communication"]


@dataclass(frozen=True, kw_only=True)
class GroupTraffic:
    """What one group of ranks exchanges in a step, on the busiest pipeline rank.

    Attributes
    ----------
    group, operation : str
    ranks, stride : int
    calls : float
        Collectives per step.
    size_bytes : float
        Of all calls together, as nccl-tests prints sizes.
    time_s : float
        As if nothing ran beside them.
    bottleneck : str
        The link that limits them.
    """

    group: str
    operation: str
    ranks: int
    stride: int
    calls: float
    size_bytes: float
    time_s: float
    bottleneck: str


def communication(step: Step, rank: int) -> tuple[GroupTraffic, ...]:
    """The traffic of one pipeline rank by group and operation.

    Parameters
    ----------
    step : Step
    rank : int
        Pipeline rank.
    """
    found: dict[tuple[str, str], list[tuple[Exchange, float]]] = {}
    for exchange, calls in _exchanges(step, rank):
        if calls and exchange.group.size > 1:
            found.setdefault((exchange.role, exchange.operation), []).append((exchange, calls))
    result = []
    for (role, operation), items in found.items():
        prices = [price(x.operation, x.size_bytes, step.cluster, x.group) for x, _ in items]
        largest = max(range(len(items)), key=lambda i: prices[i].time_s * items[i][1])
        result.append(
            GroupTraffic(
                group=role,
                operation=operation,
                ranks=items[0][0].group.size,
                stride=items[0][0].group.stride,
                calls=sum(calls for _, calls in items),
                size_bytes=sum(x.size_bytes * calls for x, calls in items),
                time_s=sum(cost.time_s * calls for cost, (_, calls) in zip(prices, items, strict=True)),
                bottleneck=prices[largest].bottleneck,
            )
        )
    return tuple(result)


def _exchanges(step: Step, rank: int) -> Iterator[tuple[Exchange, float]]:
    """Every exchange of a step with how often it happens."""
    plan, stage = step.plan, step.stages[rank]
    m = plan.num_micro_batches / plan.pipeline.copies
    for graph, times in (*stage.layers, *((graph, 1) for graph in stage.extras)):
        for item in block_collectives(graph, step.layout, step.engine.impl):
            group = step.engine.hop(item, step.groups)
            yield Exchange(item.group, item.op, group, item.size_bytes), item.count * times * m
        if plan.shards_parameters:
            weights = block_weights(graph, step.layout)
            yield from ((x, 2 * times * m * x.times) for x in step.block_gathers(graph))
            yield from ((x, times * m * x.times) for x in step.reductions(*weights))
    if not plan.shards_parameters:
        weights = stage_weights(stage, step.layout, plan.pp)
        yield from ((x, x.times) for x in step.gathers(*weights))
        yield from ((x, m if plan.zero == "2" else 1) for x in step.reductions(*weights))
    if step.training.gradient_clipping:
        yield from ((x, 1) for x in step.norm_exchanges())
    partial, tied = step.summed_gradients(stage)
    yield from ((x, x.times * (plan.num_micro_batches if step.sums_every_micro_batch else 1)) for x in partial)
    yield from ((x, 1) for x in tied)
    if plan.pp > 1:
        yield from ((x, transfers_of(stage, plan.pp, plan.vpp, plan.pipeline) * m) for x in step.p2p())
