"""Training weights of the model itself: all of them, all of some layers, or only the biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simllm.errors import InputError
from simllm.models.finetuning.method import Method, Targeted
from simllm.models.finetuning.rewrite import Editor, frozen, rewrite, unchanged
from simllm.models.graph import Graph, ModelGraph, Operator, Weight
from simllm.models.operators import Norm
from simllm.models.spec import ModelSpec

__all__ = ["BitFit", "Freeze", "Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full fine-tuning: the graph as it is."""

    name: ClassVar[str] = "full"
    formula: ClassVar[str] = "all parameters"
    paper: ClassVar[str] = "Howard 2018, arXiv:1801.06146"

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        return graph


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """Train whole layers and freeze the rest (FT-Top2 of arXiv:2106.09685, table 3, with ``top=2``).

    Attributes
    ----------
    top : int
        The last so many layers are trained.
    layers : tuple of int
        Or these layers.
    head : bool
        The final norm and the output head too.
    """

    name: ClassVar[str] = "freeze"
    formula: ClassVar[str] = "the parameters of the layers left trainable"
    paper: ClassVar[str] = "Lee 2019, arXiv:1911.03090"

    top: int = 0
    layers: tuple[int, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        if bool(self.top) == bool(self.layers):
            raise InputError("freeze needs either top=N, the number of last layers to train, or layers, their numbers")

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        count = len(graph.layers)
        if not 0 <= self.top <= count:
            raise InputError(f"top={self.top}: the model has {count} layers")
        chosen = frozenset(self.layers or range(count - self.top, count))
        if not chosen <= set(range(count)):
            raise InputError(f"layers={sorted(chosen)}: the model has layers 0 to {count - 1}")
        head = _all_but_tied if self.head else frozen
        return rewrite(graph, layer=unchanged, other_layer=frozen, head=head, layers=chosen)


def _all_but_tied(graph: Graph) -> Graph:
    return Editor(graph, lambda operator, weight: not weight.tied).graph()


@dataclass(frozen=True, kw_only=True)
class BitFit(Targeted):
    """Biases only (Ben Zaken 2021, arXiv:2106.10199): those of the products and of the norms."""

    name: ClassVar[str] = "bitfit"
    formula: ClassVar[str] = "all biases"
    paper: ClassVar[str] = "Ben Zaken 2021, arXiv:2106.10199"

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        if self.targets:
            raise InputError("bitfit takes no targets: it trains every bias")

        def edit(block: Graph) -> Graph:
            return Editor(block, _is_bias).graph()

        result = rewrite(graph, layer=edit, stem=edit, head=edit, between=edit, layers=self.chosen_layers(graph))
        if not any(weight.trained for part, _ in result.parts for weight in part.weights):
            raise InputError(f"bitfit: {spec.name} has no biases; use another method, such as lora")
        return result


def _is_bias(operator: Operator, weight: Weight) -> bool:
    return weight.name.endswith(".bias") and (isinstance(operator, Norm) or operator.component != "embedding")
