"""Gradients that are reduced beside data parallelism: of weights that tensor-parallel ranks hold whole, of tied tables.

Both are read off the sharding. A weight that every tensor-parallel rank holds has a part of its gradient on each where
the ranks use it on different tokens or heads: the parts are summed over tp (arXiv:2205.05198, section 4.2.2; Megatron-
Core's finalize_model_grads). A tied table stands on the first and on the last pipeline rank, and both sum what they
found (arXiv:1909.08053, appendix; Megatron-Core's embedding group).
"""

from __future__ import annotations

from functools import lru_cache

from simllm.models.graph import Graph, Layout, ModelGraph, Operator, Weight
from simllm.models.operators import Projection
from simllm.parallel.stages import Stage

__all__ = ["partial_over_tp", "partial_sizes", "tied_elements"]


def partial_over_tp(operator: Operator, weight: Weight, layout: Layout) -> bool:
    """Whether each tensor-parallel rank has a part of the gradient of a weight that it holds whole.

    So it is where the ranks used the weight on different tokens (sequence parallelism) or on different heads (a norm
    of each head; key-value heads that are fewer than the ranks).
    """
    if layout.tp == 1 or weight.is_expert:
        return False
    for axis in weight.axes:
        if axis.name in ("heads", "ffn", "vocab", "inner"):
            return False
        if axis.name == "kv_heads":
            return axis.units < layout.tp
    tensors = (*operator.inputs, *operator.outputs)
    if isinstance(operator, Projection):
        # What a row-wise product adds to its reduced result is added by all ranks alike.
        return layout.sequence_parallel and not any(tensor.tp_sharded for tensor in tensors)
    return layout.sequence_parallel or any(tensor.tp_sharded for tensor in tensors)


@lru_cache(maxsize=65536)
def _block_sizes(graph: Graph, layout: Layout) -> tuple[int, ...]:
    return tuple(
        layout.weight_elements(weight)
        for operator in graph.operators
        for weight in operator.weights
        if weight.trained and weight.stored(False) and partial_over_tp(operator, weight, layout)
    )


@lru_cache(maxsize=1 << 16)
def partial_sizes(stage: Stage, layout: Layout) -> tuple[tuple[int, int], ...]:
    """Elements of each trained weight of a rank whose gradient is summed over tp, with how many have that size.

    Parameters
    ----------
    stage : Stage
    layout : Layout
    """
    found: dict[int, int] = {}
    for graph, times in (*stage.layers, *((graph, 1) for graph in stage.extras)):
        for size in _block_sizes(graph, layout):
            found[size] = found.get(size, 0) + times
    return tuple(found.items())


def tied_elements(graph: ModelGraph, stage: Stage, layout: Layout) -> int:
    """Elements of a tied table on a rank whose other copy is on another pipeline rank; 0 where there is none.

    Parameters
    ----------
    graph : ModelGraph
    stage : Stage
    layout : Layout
    """
    if stage.first == stage.last:
        return 0
    return sum(layout.weight_elements(w) for w in graph.head.weights if w.tied and w.trained and not w.beside)
