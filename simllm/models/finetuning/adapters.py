"""Adapters: two small layers inside the model's (Houlsby 2019, arXiv:1902.00751; Pfeiffer 2020, arXiv:2005.00247).

``h + W_up f(W_down h)`` with a bottleneck of b: ``2 d b + b + d`` trained parameters each. Houlsby puts one behind
attention and one behind the feed-forward layer, Pfeiffer one behind the feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simllm.errors import InputError
from simllm.models.finetuning.method import Method, check_count
from simllm.models.finetuning.rewrite import Editor, rewrite
from simllm.models.graph import Axis, Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import Activation, Norm, Projection, Residual
from simllm.models.spec import ModelSpec

__all__ = ["Houlsby", "Pfeiffer"]


@dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """Two adapters a layer.

    Attributes
    ----------
    bottleneck : int
    train_norms : bool
        The layers' norms are trained too, as in the paper.
    """

    name: ClassVar[str] = "houlsby"
    formula: ClassVar[str] = "2 L (2 d b + b + d)"
    paper: ClassVar[str] = "Houlsby 2019, arXiv:1902.00751"

    bottleneck: int = 64
    train_norms: bool = False

    def __post_init__(self) -> None:
        check_count("bottleneck", self.bottleneck)

    def places(self, block: Graph) -> list[tuple[str, int]]:
        """Where adapters go: the sums with the residual stream, and which of their inputs."""
        found = []
        for operator in block.operators:
            if isinstance(operator, Residual) and operator.name.endswith("residual"):
                found += [(operator.name, i) for i in range(1, len(operator.inputs))]
        return [place for place in found if not place[0].startswith("cross")]

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        if self.bottleneck > spec.hidden_size:
            raise InputError(
                f"bottleneck={self.bottleneck} is wider than {spec.name}, hidden size {spec.hidden_size}; use less"
            )
        return rewrite(graph, layer=self._layer)

    def _layer(self, block: Graph) -> Graph:
        editor = Editor(block, _is_norm if self.train_norms else None)
        for name, position in self.places(block):
            residual = editor.operator(name)
            x = residual.inputs[position]
            out, operators = self._adapter(f"{name}_{position}", x)
            editor.before(name, *operators)
            editor.change(name, inputs=(*residual.inputs[:position], out, *residual.inputs[position + 1 :]))
        return editor.graph()

    def _adapter(self, where: str, x: Tensor) -> tuple[Tensor, tuple[Operator, ...]]:
        name, narrow = f"adapter_{where}", Axis("fixed", self.bottleneck)
        down, act = (Tensor(f"{name}_{what}", (*x.axes[:-1], narrow)) for what in ("down", "act"))
        up, out = (Tensor(f"{name}_{what}", x.axes) for what in ("up", "out"))

        def product(what: str, source: Tensor, result: Tensor) -> Projection:
            axes = (source.axes[-1], result.axes[-1])
            weights = (
                Weight(f"{name}_{what}.weight", axes, "adapter"),
                Weight(f"{name}_{what}.bias", axes[1:], "adapter"),
            )
            return Projection(
                name=f"{name}_{what}",
                component="adapter",
                inputs=(source,),
                outputs=(result,),
                weights=weights,
                bias=True,
            )

        return out, (
            product("down", x, down),
            Activation(name=f"{name}_act", component="adapter", inputs=(down,), outputs=(act,), function="relu"),
            product("up", act, up),
            Residual(name=f"{name}_sum", component="adapter", inputs=(x, up), outputs=(out,)),
        )


def _is_norm(operator: Operator, weight: Weight) -> bool:
    return isinstance(operator, Norm)


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Houlsby):
    """One adapter a layer, behind the feed-forward layer."""

    name: ClassVar[str] = "pfeiffer"
    formula: ClassVar[str] = "L (2 d b + b + d)"
    paper: ClassVar[str] = "Pfeiffer 2020, arXiv:2005.00247"

    bottleneck: int = 64

    def places(self, block: Graph) -> list[tuple[str, int]]:
        return super().places(block)[-1:]
