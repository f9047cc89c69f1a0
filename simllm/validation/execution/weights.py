"""The weights of the graph as PyTorch's parameters: their shapes, and how FSDP2 and ZeRO-1 deal them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from simllm.models.graph import Graph, Layout, Operator, Weight
from simllm.models.operators import Projection, Router
from simllm.parallel.gradients import partial_over_tp
from simllm.parallel.stages import Stage

__all__ = ["Parameter", "Unit", "block_parameters", "whole_parameter_shares"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter on a rank after tensor and expert parallelism.

    ``rows``: its first dimension, which FSDP2 shards; ``columns``: the product of the others. ``partial``: its gradient
    is a sum over the tensor-parallel ranks.
    """

    name: str
    rows: int
    columns: int
    expert: bool
    partial: bool
    tied: bool

    @property
    def elements(self) -> int:
        """Elements on this rank."""
        return self.rows * self.columns

    def shard(self, ranks: int) -> int:
        """Elements of a shard of FSDP2: rows are padded so that all shards are equal."""
        return -(-self.rows // ranks) * self.columns

    def shard_of(self, ranks: int, rank: int) -> int:
        """Elements of one rank's shard without the padding: the last shards may be shorter, or empty."""
        rows = -(-self.rows // ranks)
        return max(0, min(rows, self.rows - rank * rows)) * self.columns


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that FSDP2 gathers together: those of a layer, its experts, or what is outside the layers."""

    parameters: tuple[Parameter, ...]
    experts: bool
    root: bool

    def gathered(self, ranks: int) -> int:
        """Elements of the gathered unit, padding included."""
        return sum(p.shard(ranks) for p in self.parameters) * ranks


def _shape(operator: Operator, weight: Weight, layout: Layout) -> tuple[int, ...]:
    sizes = [layout.size(axis) for axis in weight.axes]
    # A product's matrix is stored (out, in) by PyTorch.
    if isinstance(operator, Projection | Router) and len(sizes) == 2:
        sizes.reverse()
    return tuple(sizes)


def block_parameters(graph: Graph, layout: Layout, keep_tied: bool) -> Iterator[Parameter]:
    """The parameters of a block on a rank."""
    for operator in graph.operators:
        for weight in operator.weights:
            if not weight.stored(keep_tied):
                continue
            rows, *others = _shape(operator, weight, layout)
            yield Parameter(
                name=weight.name,
                rows=rows,
                columns=prod(others),
                expert=weight.is_expert,
                partial=partial_over_tp(operator, weight, layout),
                tied=weight.tied or weight.name == "token.weight",
            )


def stage_units(stage: Stage, layers: Iterable[Graph], layout: Layout, pp: int, experts_apart: bool) -> list[Unit]:
    """The units of a pipeline rank: its layers in order, their experts, and the rest."""
    units = []
    for graph in layers:
        own = tuple(block_parameters(graph, layout, False))
        dense = tuple(p for p in own if not (experts_apart and p.expert))
        units.append(Unit(parameters=dense, experts=False, root=False))
        if len(dense) < len(own):
            units.append(Unit(parameters=tuple(p for p in own if p.expert), experts=True, root=False))
    keep = pp > 1 and not stage.first
    head = [graph for graph in stage.extras if _is_head(graph, stage)]
    for graphs in ([graph for graph in stage.extras if graph not in head], head):
        rest = tuple(p for graph in graphs for p in block_parameters(graph, layout, keep))
        if rest:
            units.append(Unit(parameters=rest, experts=False, root=True))
    return units


def _is_head(graph: Graph, stage: Stage) -> bool:
    return stage.last and not stage.first and graph is stage.extras[-1]


def whole_parameter_shares(sizes: Iterable[int], ranks: int) -> list[int]:
    """Elements of each rank when whole parameters are dealt out, the largest first, each to the least loaded rank.

    >>> whole_parameter_shares([5, 3, 3, 2], 2)
    [7, 6]
    """
    loads = [0] * ranks
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return loads
