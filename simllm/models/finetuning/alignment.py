"""The models beside the one that is aligned: a frozen reference, and one that gives a number instead of a token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.errors import InputError
from simllm.models.finetuning.method import Method
from simllm.models.finetuning.rewrite import frozen, rewrite
from simllm.models.graph import Axis, Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import Projection
from simllm.models.spec import ModelSpec

__all__ = ["Frozen", "ValueHead"]


@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Nothing is trained: the model is only asked, as a reference or a judge."""

    name: ClassVar[str] = "frozen"
    formula: ClassVar[str] = "no parameters"
    paper: ClassVar[str] = "Ouyang 2022, arXiv:2203.02155"

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        return rewrite(graph, layer=frozen)


@dataclass(frozen=True, kw_only=True)
class ValueHead(Method):
    """A reward or value model: one number for every token in place of the logits (Stiennon 2020, arXiv:2009.01325).

    Attributes
    ----------
    inner : Method or None
        How the rest is trained; None: all of it. The head is trained except in a frozen model.
    """

    name: ClassVar[str] = "value-head"
    formula: ClassVar[str] = "those of the method, and d of the head"
    paper: ClassVar[str] = "Stiennon 2020, arXiv:2009.01325"

    inner: Method | None = None

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        if spec.architecture not in ("causal-decoder", "prefix-decoder"):
            raise InputError(f"alignment is modelled for decoders, and {spec.name} is an {spec.architecture}")
        trained = not isinstance(self.inner, Frozen)
        inner = self.inner.apply(graph, spec) if self.inner else graph
        return replace(inner, head=_scored(inner.head, trained))


def _scored(head: Graph, trained: bool) -> Graph:
    """The head with one column; the loss over single numbers moves next to nothing."""
    operators: list[Operator] = []
    for operator in head.operators:
        if operator.name == "loss" or ".lora_" in operator.name:
            continue
        if operator.name != "lm_head":
            operators.append(operator)
            continue
        x = operator.inputs[0]
        one = Axis("fixed", 1)
        score = Tensor("score", (*x.axes[:-1], one))
        weight = Weight("score.weight", (x.axes[-1], one), "head", trained=trained)
        operators.append(Projection(name="score", component="head", inputs=(x,), outputs=(score,), weights=(weight,)))
    return replace(head, operators=tuple(operators), output=operators[-1].outputs[0])
