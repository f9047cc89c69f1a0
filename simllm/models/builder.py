"""Collects the operators of one block in order: the pieces that every sub-layer is made of."""

from __future__ import annotations

from typing import Any

from simllm.models.graph import Axis, AxisName, Graph, Operator, Tensor, Weight
from simllm.models.operators import Norm, Projection, Residual
from simllm.models.spec import ModelSpec, NormSpec

__all__ = ["Builder"]


class Builder:
    """Operators of one block.

    Parameters
    ----------
    spec : ModelSpec
    tokens : str
        Axis of the tokens that flow through the block.
    """

    def __init__(self, spec: ModelSpec, tokens: AxisName = "tokens") -> None:
        self.spec = spec
        self.hidden = Axis("hidden", spec.hidden_size)
        self.operators: list[Operator] = []
        self.set_tokens(tokens)

    def set_tokens(self, tokens: AxisName) -> None:
        """Let other tokens flow from here on."""
        self.tokens = Axis(tokens)
        self.keys: AxisName = "source_keys" if tokens == "source_tokens" else "keys"

    def add(
        self,
        operator: type[Operator],
        name: str,
        component: str,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        weights: tuple[Weight, ...] = (),
        **details: Any,
    ) -> Tensor:
        """Append an operator; returns its first output."""
        self.operators.append(
            operator(name=name, component=component, inputs=inputs, outputs=outputs, weights=weights, **details)
        )
        return outputs[0]

    def graph(
        self, name: str, start: Tensor, end: Tensor, lends: tuple[Tensor, ...] = (), borrows: tuple[Tensor, ...] = ()
    ) -> Graph:
        """The block so far."""
        return Graph(
            name=name,
            operators=tuple(self.operators),
            input=start,
            output=end,
            lends=lends,
            borrows=frozenset(tensor.name for tensor in borrows),
        )

    def stream(self, name: str) -> Tensor:
        """A tensor of the residual stream."""
        return Tensor(name, (self.tokens, self.hidden))

    def norm(self, norm: NormSpec, x: Tensor, name: str, component: str = "norm", axis: Axis | None = None) -> Tensor:
        """A norm over the last axis of ``x``, or over ``axis`` when the weight is shorter (one per head)."""
        width = Axis("fixed", axis.size) if axis else x.axes[-1]
        weights: tuple[Weight, ...] = ()
        if norm.affine:
            weights = (Weight(f"{name}.weight", (width,), component),)
            if norm.bias:
                weights += (Weight(f"{name}.bias", (width,), component),)
        return self.add(Norm, name, component, (x,), (Tensor(name, x.axes),), weights, kind=norm.kind)

    def project(
        self,
        name: str,
        x: Tensor,
        outputs: dict[str, tuple[str, Axis]],
        component: str,
        bias: bool,
        tied: bool = False,
        beside: bool = False,
        dtype: str = "activation",
    ) -> tuple[Tensor, ...]:
        """``x`` times one weight per entry of ``outputs`` (weight name -> tensor name and axis), side by side."""
        weights: list[Weight] = []
        results: list[Tensor] = []
        for weight, (tensor, axis) in outputs.items():
            weights.append(Weight(f"{weight}.weight", (x.axes[-1], axis), component, tied=tied, beside=beside))
            if bias:
                weights.append(Weight(f"{weight}.bias", (axis,), component, tied=beside, beside=beside))
            results.append(Tensor(tensor, (*x.axes[:-1], axis), dtype))  # type: ignore[arg-type]
        self.add(Projection, name, component, (x,), tuple(results), tuple(weights), bias=bias)
        return tuple(results)

    def residual(self, x: Tensor, branches: tuple[Tensor, ...], name: str, scale: float = 1.0) -> Tensor:
        """The residual stream, scaled, plus one or more branches."""
        dropout = self.spec.hidden_dropout > 0
        out = (self.stream(name),)
        return self.add(Residual, name, "residual", (x, *branches), out, dropout=dropout, scaled=scale != 1.0)
