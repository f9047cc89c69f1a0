"""The operators that fine-tuning methods add to the graph."""

from __future__ import annotations

from dataclasses import dataclass

from simllm.models.graph import Axis, Implementation, Layout, Operator, Tensor
from simllm.models.work import Gemm, Stream, Work

__all__ = ["AdapterAttention", "Decompose", "Join", "LowRankSum", "Lstm", "Scale"]


def _bytes(layout: Layout, impl: Implementation, *tensors: Tensor) -> float:
    return sum(layout.elements(tensor) * impl.bytes_of(tensor) for tensor in tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankSum(Operator):
    """``y = base + scale * delta`` for one or several outputs side by side: two kernels, nothing kept.

    Inputs are the bases, then the deltas. Backward: the gradient of ``delta`` is scaled, and the gradient that comes
    back from the low-rank product is added to that of the base's input, ``source``.
    """

    source: Tensor

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(5 * _bytes(layout, impl, *self.outputs), 2),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        moved = 2 * _bytes(layout, impl, *self.outputs) + 3 * _bytes(layout, impl, self.source)
        return (Stream(moved, 2),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Operator):
    """``y = l * x`` with one learned factor per column: keeps ``x`` for the factors' gradient."""

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, *self.inputs, *self.outputs)),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        # The gradient times x, written, then summed over the tokens.
        return (Stream(4 * _bytes(layout, impl, *self.inputs), 2),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return self.inputs if any(weight.trained for weight in self.weights) else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Decompose(Operator):
    """DoRA's sum: base and low-rank result, scaled by magnitude over the norm of the merged weight.

    Inputs are the bases, then the deltas; weights are the magnitudes, then the base matrices, which are only read. The
    merged weight and its norm are made anew in every forward pass, by sending an identity through the low-rank pair,
    and carry no gradient (arXiv:2402.09353, section 4.3).
    """

    rank: int
    in_axis: Axis
    bias: bool = False

    def _merged(self, layout: Layout) -> tuple[int, int]:
        half = len(self.outputs)
        width = sum(layout.size(weight.axes[0]) for weight in self.weights[:half])
        return layout.size(self.in_axis), width

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows, columns = self._merged(layout)
        # The merged weight: scaled (2), added (3), its norm taken (1). The outputs: two products with a vector (4), the
        # scale (2), the sum of both (3), the sum with the base (3); without its bias the base is written again (2).
        weight = 6 * rows * columns * impl.activation_bytes
        passes = 12 + 2 * self.bias
        return (
            Gemm(rows, self.rank, rows),
            Gemm(rows, columns, self.rank),
            Stream(weight, 3),
            Stream(passes * _bytes(layout, impl, *self.outputs), 5 + self.bias),
        )

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(9 * _bytes(layout, impl, *self.outputs), 4),)

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(8 * _bytes(layout, impl, *self.outputs), 4),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        half = len(self.outputs)
        bases, deltas = self.inputs[:half], self.inputs[half:]
        if self.bias:
            bases = tuple(Tensor(f"{t.name}.without_bias", t.axes) for t in bases)
        # The norm, magnitude over norm, and that less one: a vector each.
        vectors = tuple(
            Tensor(f"{t.name}.{what}", t.axes[-1:]) for t in self.outputs for what in ("norm", "ratio", "excess")
        )
        return (*bases, *deltas, *vectors)


@dataclass(frozen=True, kw_only=True, eq=False)
class Join(Operator):
    """Learned tensors in front of others along the tokens: a copy of all of them, nothing kept."""

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(2 * _bytes(layout, impl, *self.inputs), max(1, len(self.inputs) // 2)),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lstm(Operator):
    """One bidirectional LSTM layer over the virtual tokens (P-Tuning's encoder): four gates in each direction.

    The steps follow each other; each reads the recurrent weights again.
    """

    steps: int
    hidden: int

    def _products(self, layout: Layout) -> tuple[Gemm, ...]:
        batch = max(1, layout.tokens(self.inputs[0]) // self.steps)
        width = layout.size(self.inputs[0].axes[-1])
        return (
            Gemm(batch * self.steps, 4 * self.hidden, width, 2),
            Gemm(batch, 4 * self.hidden, self.hidden, 2 * self.steps),
        )

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (*self._products(layout), Stream(8 * _bytes(layout, impl, *self.outputs), 2 * self.steps))

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self._products(layout)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        out = self.outputs[0]
        # Both directions keep four gates, the cell and its tanh, in the width of the output.
        kept = tuple(Tensor(f"{self.name}.{gate}", out.axes) for gate in ("i", "f", "g", "o", "cell", "tanh"))
        return (self.inputs[0], out, *kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterAttention(Operator):
    """LLaMA-Adapter: queries on a few learned tokens, times a learned gate, added to a layer's attention.

    Inputs are what the layer's attention reads and what it produced; weights the learned tokens and the gate. Queries
    are projected once more, keys, values and the result with the layer's frozen matrices; single operators, softmax in
    float32 (arXiv:2303.16199, section 3.2; peft).
    """

    keys: int
    q_axis: Axis
    kv_axis: Axis
    head_dim: int

    def _sizes(self, layout: Layout) -> tuple[int, int, int, int]:
        x = self.inputs[0]
        return (
            layout.tokens(x, gathered=True),
            layout.size(x.axes[-1]),
            layout.size(self.q_axis),
            layout.size(self.kv_axis),
        )

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows, hidden, width, kv = self._sizes(layout)
        heads = max(1, width // self.head_dim)
        return (
            Gemm(rows, width, hidden),
            Gemm(layout.batch * self.keys, kv, hidden, 2),
            Gemm(rows, self.keys, self.head_dim, heads),
            Stream(rows * heads * self.keys * (4 * impl.activation_bytes + 8), 4),
            Gemm(rows, self.head_dim, self.keys, heads),
            Gemm(rows, hidden, width),
            Stream(3 * _bytes(layout, impl, *self.outputs)),
        )

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows, _, width, _ = self._sizes(layout)
        heads = max(1, width // self.head_dim)
        return (Gemm(self.keys, self.head_dim, rows, 2 * heads),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        x = self.inputs[0]
        learned = Axis("virtual", self.keys)
        head = Axis(self.q_axis.name, self.q_axis.size // self.head_dim, self.q_axis.units)
        scores = (x.axes[0], head, Axis("fixed", self.keys))
        return (
            Tensor(f"{self.name}.q", (x.axes[0], self.q_axis)),
            Tensor(f"{self.name}.k", (learned, self.q_axis)),
            Tensor(f"{self.name}.v", (learned, self.q_axis)),
            Tensor(f"{self.name}.softmax", scores, "float32"),
            Tensor(f"{self.name}.gated", scores),
        )
