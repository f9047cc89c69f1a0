"""Rewriting the graph: edit blocks, keep equal layers equal, and say where gradients no longer need to go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from simllm.models.graph import Graph, Implementation, ModelGraph, Operator, Tensor, Weight

__all__ = ["Editor", "frozen", "rewrite", "unchanged"]

Edit = Callable[[Graph], Graph]


def unchanged(graph: Graph) -> Graph:
    """A block as it is."""
    return graph


def frozen(graph: Graph) -> Graph:
    """A block of which nothing is trained."""
    return Editor(graph).graph()


class Editor:
    """The operators of one block, to be changed one by one.

    Parameters
    ----------
    graph : Graph
    trains : callable, optional
        Which weights stay trained; none by default.
    """

    def __init__(self, graph: Graph, trains: Callable[[Operator, Weight], bool] | None = None) -> None:
        self._graph = graph
        self.operators = [
            replace(
                operator,
                weights=tuple(
                    replace(w, trained=w.trained and trains is not None and trains(operator, w))
                    for w in operator.weights
                ),
            )
            for operator in graph.operators
        ]

    def _index(self, name: str) -> int:
        return next(i for i, operator in enumerate(self.operators) if operator.name == name)

    def operator(self, name: str) -> Operator:
        """An operator by name."""
        return self.operators[self._index(name)]

    def change(self, name: str, **changes: object) -> Operator:
        """Change fields of an operator."""
        index = self._index(name)
        self.operators[index] = replace(self.operators[index], **changes)  # type: ignore[arg-type]
        return self.operators[index]

    def before(self, name: str, *operators: Operator) -> None:
        """Insert operators in front of one."""
        index = self._index(name)
        self.operators[index:index] = operators

    def after(self, name: str, *operators: Operator) -> None:
        """Insert operators behind one."""
        index = self._index(name) + 1
        self.operators[index:index] = operators

    def divert(self, name: str, outputs: Collection[Tensor], suffix: str = "base") -> tuple[Tensor, ...]:
        """Rename outputs of an operator, so that what is inserted behind it can produce them instead."""
        operator = self.operator(name)
        aside = {t.name: _aside(t, suffix) for t in outputs}
        self.change(name, outputs=tuple(aside.get(t.name, t) for t in operator.outputs))
        return tuple(aside[t.name] for t in outputs)

    def graph(self, **changes: object) -> Graph:
        """The block with its changes."""
        return replace(self._graph, operators=tuple(self.operators), **changes)  # type: ignore[arg-type]


def _aside(tensor: Tensor, suffix: str) -> Tensor:
    """Logits are the loss's business; what goes into their sum is an activation like any other."""
    aside = replace(tensor, name=f"{tensor.name}.{suffix}")
    return replace(aside, dtype="activation") if tensor.dtype == "logits" else aside


def rewrite(
    model: ModelGraph,
    *,
    layer: Edit,
    stem: Edit = frozen,
    head: Edit = frozen,
    between: Edit = frozen,
    other_layer: Edit = frozen,
    layers: Collection[int] | None = None,
    virtual_tokens: int = 0,
) -> ModelGraph:
    """A model with every block edited.

    Parameters
    ----------
    model : ModelGraph
    layer, other_layer : callable
        For the layers in ``layers`` (all of them when None), and for the rest.
    stem, head, between : callable
        For the first and the last block, and for those between the layers of an encoder and a decoder.
    layers : collection of int, optional
    virtual_tokens : int
        Learned tokens that now stand in front of every sequence.

    Returns
    -------
    ModelGraph
        Layers that were the same object still are, unless gradients stop at one of them.
    """
    made: dict[tuple[int, bool], Graph] = {}

    def edited(graph: Graph, chosen: bool) -> Graph:
        key = (id(graph), chosen)
        if key not in made:
            made[key] = (layer if chosen else other_layer)(graph)
        return made[key]

    return _propagate(
        replace(
            model,
            stem=stem(model.stem),
            layers=tuple(edited(graph, layers is None or i in layers) for i, graph in enumerate(model.layers)),
            head=head(model.head),
            bridges=tuple((at, between(graph)) for at, graph in model.bridges),
            last_layers=tuple(edited(graph, layers is None) for graph in model.last_layers),
            last_extras=tuple(between(graph) for graph in model.last_extras),
            virtual_tokens=model.virtual_tokens + virtual_tokens,
        )
    )


def _propagate(model: ModelGraph) -> ModelGraph:
    """Tell every block which tensors from outside nothing trained went into.

    A gradient flows back to the first trained weight and no further.
    """
    settled: dict[tuple[int, frozenset[str]], Graph] = {}
    stops: set[str] = set()  # borrowed tensors without gradient

    def settle(graph: Graph, alive: bool) -> Graph:
        produced = {tensor.name for operator in graph.operators for tensor in operator.outputs}
        outside = {t.name for operator in graph.operators for t in operator.inputs if t.name not in produced}
        closed = frozenset(name for name in outside if (name in stops if name in graph.borrows else not alive))
        key = (id(graph), closed)
        if key not in settled:
            settled[key] = replace(graph, frozen_inputs=closed)
        return settled[key]

    bridges = dict(model.bridges)
    stem = settle(model.stem, alive=False)
    stops.update(t.name for t in stem.lends if t.name not in stem.differentiated)
    alive = stem.output.name in stem.differentiated
    layers: list[Graph] = []
    crossed: dict[int, Graph] = {}
    for index, graph in enumerate(model.layers):
        if index in bridges:
            bridge = settle(bridges[index], alive)
            crossed[index] = bridge
            if not alive and not _trains(bridge.operators[:-1]):
                stops.update(t.name for t in bridge.lends)
            alive = bridge.output.name in bridge.differentiated
        layers.append(settle(graph, alive))
        alive = alive or _trains(graph.operators)
        alive = layers[-1].output.name in layers[-1].differentiated
    last_layers = tuple(settle(graph, alive) for graph in model.last_layers)
    alive = alive or any(_trains(graph.operators) for graph in last_layers)
    needed = {t.name for graph in (*layers, *last_layers) for t in _kept_from_outside(graph)}

    def lend(graph: Graph) -> Graph:
        lends = tuple(t for t in graph.lends if t.name in needed)
        return graph if lends == graph.lends else replace(graph, lends=lends)

    return replace(
        model,
        stem=lend(stem),
        layers=tuple(layers),
        head=settle(model.head, alive),
        bridges=tuple((at, lend(graph)) for at, graph in crossed.items()),
        last_layers=last_layers,
        last_extras=tuple(settle(graph, alive) for graph in model.last_extras),
    )


def _trains(operators: Iterable[Operator]) -> bool:
    return any(weight.trained for operator in operators for weight in operator.weights)


def _kept_from_outside(graph: Graph) -> Iterable[Tensor]:
    """Borrowed tensors that the backward pass of a block needs."""
    for operator in graph.operators:
        if graph.runs_backward(operator):
            for tensor in operator.saved(Implementation()):
                if tensor.name in graph.borrows:
                    yield tensor
