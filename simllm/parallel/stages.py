"""What each pipeline rank holds: its layers, and the stem and the head on the first and the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from simllm.models.graph import Graph, Layout, ModelGraph
from simllm.parallel.plan import split_layers
from simllm.parallel.schedules import stage_of
from simllm.parallel.schedules.actions import Placement
from simllm.parallel.states import block_moments

__all__ = [
    "Stage",
    "block_frozen_bytes",
    "block_weights",
    "pipeline_stages",
    "stage_frozen_bytes",
    "stage_moments",
    "stage_weights",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One pipeline rank.

    Attributes
    ----------
    rank : int
    layers : tuple of (Graph, int)
        Distinct layers with how often they occur, all chunks of the rank together.
    extras : tuple of Graph
        Stem, bridge between encoder and decoder, what is around multi-token prediction, and head, where they stand on
        this rank.
    first, last : bool
        Whether the rank holds the stem or the head.
    """

    rank: int
    layers: tuple[tuple[Graph, int], ...]
    extras: tuple[Graph, ...]
    first: bool
    last: bool

    @property
    def num_layers(self) -> int:
        """Layers on this rank."""
        return sum(times for _, times in self.layers)


@lru_cache(maxsize=4096)
def pipeline_stages(
    graph: ModelGraph, pp: int, vpp: int, uneven: bool = False, placement: Placement = "loop"
) -> tuple[Stage, ...]:
    """Deal the layers out to the pipeline ranks, chunk by chunk."""
    split = split_layers(len(graph.layers), pp * vpp, uneven)
    bounds = [sum(split[:i]) for i in range(len(split) + 1)]
    stages = []
    for rank in range(pp):
        counts: dict[int, int] = {}
        graphs: dict[int, Graph] = {}
        own = [stage_of(placement, pp, rank, chunk) for chunk in range(2 if placement == "both" else vpp)]
        first, last = 0 in own, pp * vpp - 1 in own
        extras: list[Graph] = [graph.stem] if first else []
        for chunk in own:
            for index in range(bounds[chunk], bounds[chunk + 1]):
                layer = graph.layers[index]
                graphs[id(layer)] = layer
                counts[id(layer)] = counts.get(id(layer), 0) + 1
                extras += [bridge for at, bridge in graph.bridges if at == index]
        if last:
            for layer in graph.last_layers:
                graphs[id(layer)] = layer
                counts[id(layer)] = counts.get(id(layer), 0) + 1
            extras += [*graph.last_extras, graph.head]
        stages.append(
            Stage(
                rank=rank,
                layers=tuple((graphs[key], times) for key, times in counts.items()),
                extras=tuple(extras),
                first=first,
                last=last,
            )
        )
    return tuple(stages)


@lru_cache(maxsize=65536)
def block_weights(graph: Graph, layout: Layout, keep_tied: bool = False) -> tuple[int, int]:
    """Dense and expert parameters of one block on one rank that are trained."""
    dense = expert = 0
    for weight in graph.weights:
        if not weight.trained or not weight.stored(keep_tied):
            continue
        if weight.is_expert:
            expert += layout.weight_elements(weight)
        else:
            dense += layout.weight_elements(weight)
    return dense, expert


@lru_cache(maxsize=65536)
def block_frozen_bytes(graph: Graph, layout: Layout, element: float, keep_tied: bool = False) -> tuple[float, float]:
    """Bytes of the frozen dense and expert weights of one block on one rank, as they are stored.

    ``element``: bytes of a parameter that is kept in the compute precision.
    """
    dense = expert = 0.0
    for weight in graph.weights:
        if weight.trained or not weight.stored(keep_tied):
            continue
        elements = layout.weight_elements(weight)
        size = elements * element if weight.storage is None else weight.storage.bytes(elements)
        if weight.is_expert:
            expert += size
        else:
            dense += size
    return dense, expert


def _over_blocks(stage: Stage, pp: int, of: Callable[[Graph, bool], tuple[float, float]]) -> tuple[float, float]:
    """A quantity of dense and expert weights, added up over the blocks of a rank.

    With a pipeline the last rank holds its own copy of a tied token table, as Megatron-LM's does.
    """
    blocks = [(graph, times, False) for graph, times in stage.layers]
    blocks += [(graph, 1, pp > 1 and not stage.first) for graph in stage.extras]
    dense = expert = 0.0
    for graph, times, keep_tied in blocks:
        own_dense, own_expert = of(graph, keep_tied)
        dense += own_dense * times
        expert += own_expert * times
    return dense, expert


@lru_cache(maxsize=1 << 16)
def stage_moments(
    stage: Stage, layout: Layout, pp: int, optimizer: str, element: int, paged: bool = False
) -> tuple[float, float]:
    """Bytes of optimizer moments of dense and expert weights on one rank of a stage; ``paged``: those on the host."""
    return _over_blocks(stage, pp, lambda graph, tied: block_moments(graph, layout, optimizer, element, tied, paged))


@lru_cache(maxsize=1 << 16)
def stage_frozen_bytes(stage: Stage, layout: Layout, pp: int, element: float) -> tuple[float, float]:
    """Bytes of frozen dense and expert weights on one rank of a stage, as they are stored."""
    return _over_blocks(stage, pp, lambda graph, tied: block_frozen_bytes(graph, layout, element, tied))


@lru_cache(maxsize=1 << 16)
def stage_weights(stage: Stage, layout: Layout, pp: int) -> tuple[int, int]:
    """Dense and expert parameters on one rank of a stage that are trained."""
    dense, expert = _over_blocks(stage, pp, lambda graph, tied: block_weights(graph, layout, tied))
    return round(dense), round(expert)
