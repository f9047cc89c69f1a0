"""Folds over the graph that need no plan: parameters, FLOPs and the key-value cache of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from simllm.models.graph import Graph, Implementation, Layout, ModelGraph, Operator, Weight
from simllm.models.operators import Attention, GroupedProjection

__all__ = [
    "FlopCounts",
    "ParameterCounts",
    "backward_flops",
    "count_flops",
    "count_parameters",
    "count_trainable",
    "kv_cache_bytes_per_token",
    "operator_flops",
]

_EMBEDDING = "embedding"
_HEAD = "head"


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of a model, tied matrices once.

    Attributes
    ----------
    total, active : int
        All parameters, and those that one token passes through: of the experts only the chosen fraction.
    embedding : int
        Token, position and type tables.
    lm_head : int
        The output matrix and its bias; 0 when the matrix is the token table.
    non_embedding : int
        ``total - embedding - lm_head``.
    multi_token_prediction : int
        Those of ``total`` that are in multi-token-prediction modules.
    by_component : dict of str to int
        Adds up to ``total``.
    """

    total: int
    active: int
    embedding: int
    lm_head: int
    non_embedding: int
    multi_token_prediction: int
    by_component: dict[str, int]


def _weights(graph: ModelGraph) -> Iterator[tuple[Weight, int]]:
    for part, times in graph.parts:
        for weight in part.weights:
            if weight.counted and not weight.tied:
                yield weight, times


def count_trainable(graph: ModelGraph) -> int:
    """Parameters that have a gradient."""
    return sum(weight.elements * times for weight, times in _weights(graph) if weight.trained)


def count_parameters(graph: ModelGraph) -> ParameterCounts:
    """Count parameters by adding up the weights of the graph.

    Parameters
    ----------
    graph : ModelGraph

    Returns
    -------
    ParameterCounts

    Examples
    --------
    >>> from simllm.models import Model
    >>> Model.load("gpt2").parameters.total
    124439808
    """
    by_component: dict[str, int] = {}
    active = 0
    for weight, times in _weights(graph):
        count = weight.elements * times
        by_component[weight.component] = by_component.get(weight.component, 0) + count
        used, stored = weight.active
        active += count * used // stored
    total = sum(by_component.values())
    embedding = by_component.get(_EMBEDDING, 0)
    tied_head = any(weight.tied for weight in graph.head.weights)
    lm_head = 0 if tied_head else by_component.get(_HEAD, 0)
    return ParameterCounts(
        total=total,
        active=active,
        embedding=embedding,
        lm_head=lm_head,
        non_embedding=total - embedding - lm_head,
        multi_token_prediction=sum(
            weight.elements
            for part in (*graph.last_layers, *graph.last_extras)
            for weight in part.weights
            if not weight.tied
        ),
        by_component=by_component,
    )


@dataclass(frozen=True, kw_only=True)
class FlopCounts:
    """FLOPs of matrix products and convolutions; norms, activations, softmax and look-ups count as zero.

    Attributes
    ----------
    forward_full_attention : int
        Attention over the full square of scores, whatever its mask: the convention of PyTorch's FlopCounterMode,
        torchtitan and llm-foundry.
    forward_masked : int
        Only the pairs that the mask keeps.
    training_full_attention, training_masked : int
        Forward and backward, which is twice the forward where everything is trained; no recomputation.
    by_component : dict of str to int
        Masked forward FLOPs; adds up to ``forward_masked``.
    """

    forward_full_attention: int
    forward_masked: int
    training_full_attention: int
    training_masked: int
    by_component: dict[str, int]


def operator_flops(operator: Operator, layout: Layout) -> tuple[int, int]:
    """Forward FLOPs of one operator: over full attention, and masked."""
    work = operator.forward(layout, Implementation())
    return sum(item.flops for item in work), sum(item.masked_flops for item in work)


def backward_flops(graph: Graph, operator: Operator, layout: Layout) -> tuple[int, int]:
    """FLOPs of the gradients that the backward pass asks of an operator: over full attention, and masked.

    Twice the forward pass where everything is trained (arXiv:2104.04473, appendix).
    """
    impl, through = Implementation(), graph.needs_input_gradient(operator)
    work = operator.backward_input(layout, impl) if through else ()
    if isinstance(operator, GroupedProjection):
        # Its weight gradients are priced with a whole number of rows an expert; the FLOPs are those of all rows.
        matrices = [weight for weight in operator.weights if len(weight.axes) > 2]
        share = sum(w.elements for w in matrices if w.trained), sum(w.elements for w in matrices)
        product = operator_flops(operator, layout)[0]
        whole = product * through + product * share[0] // share[1]
        return whole, whole
    work += operator.backward_weight(layout, impl)
    return sum(item.flops for item in work), sum(item.masked_flops for item in work)


def _graph_flops(graphs: Iterable[tuple[Graph, int]], layout: Layout) -> tuple[int, dict[str, int], int, int]:
    full = back_full = back_masked = 0
    masked: dict[str, int] = {}
    for graph, times in graphs:
        for operator in graph.operators:
            whole, kept = operator_flops(operator, layout)
            if whole:
                name = "attention_scores" if isinstance(operator, Attention) else operator.component
                full += whole * times
                masked[name] = masked.get(name, 0) + kept * times
                back_whole, back_kept = backward_flops(graph, operator, layout)
                back_full += back_whole * times
                back_masked += back_kept * times
    return full, masked, back_full, back_masked


def count_flops(graph: ModelGraph, layout: Layout) -> FlopCounts:
    """FLOPs of one micro-batch: every operator's forward work, added up.

    Logits are computed for all positions. The backward pass of a matrix product is two products of the same size
    (arXiv:2104.04473, appendix), of one with frozen weights one product, or none before the first trained weight.

    Parameters
    ----------
    graph : ModelGraph
    layout : Layout
        Batch and sequence length; degrees give the FLOPs of one rank.

    Returns
    -------
    FlopCounts
    """
    full, masked, back_full, back_masked = _graph_flops(graph.parts, layout)
    total = sum(masked.values())
    return FlopCounts(
        forward_full_attention=full,
        forward_masked=total,
        training_full_attention=full + back_full,
        training_masked=total + back_masked,
        by_component=masked,
    )


def kv_cache_bytes_per_token(graph: ModelGraph, bytes_per_element: float = 2.0, cross: bool = False) -> float:
    """Bytes that generation keeps per token of context: keys and values of every layer, or the latents of MLA.

    Sliding windows are not applied: below the window every layer keeps every token.

    Parameters
    ----------
    graph : ModelGraph
    bytes_per_element : float
        2 for bf16.
    cross : bool
        Count what cross-attention keeps per token of the encoder's sequence, instead of what self-attention keeps per
        generated token.
    """
    width = 0
    for layer in graph.layers:
        for operator in layer.operators:
            # An encoder sees its sequence once and keeps nothing.
            if (
                isinstance(operator, Attention)
                and operator.mask != "bidirectional"
                and (operator.mask == "cross") == cross
            ):
                width += sum(prod(axis.size for axis in tensor.axes[1:]) for tensor in operator.cached())
    return width * bytes_per_element
