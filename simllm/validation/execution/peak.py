"""Peak memory of a rank: a walk backward through the operators of a block, tensor by tensor.

While a block goes backward its kept tensors disappear one after the other, and gradients take their place. The walk
follows autograd: an operator's gradients of inputs and weights exist together with those of its outputs, and what an
operator kept is freed after it. The engine's closed form (`simllm.parallel.memory`) is the coarser one: states, kept
tensors and the widest operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from simllm.models.activations import kept_tensors
from simllm.models.graph import Graph, Implementation, Layout, Operator, Tensor
from simllm.models.operators import Activation, Attention, Combine, Loss, Norm, Projection, Residual, Rope

__all__ = ["Step", "backward_peak", "backward_steps", "input_gradient_peak", "logits_bytes", "loss_workspace"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator of a backward pass; bytes.

    Attributes
    ----------
    during, after : float
        What is still kept and gradients of tensors, those of weights apart.
    moving : float
        Of ``during`` the gradients and temporaries.
    results : float
        Gradients of its results.
    weights : tuple of float
        Gradients of its weights.
    """

    operator: Operator
    during: float
    after: float
    moving: float
    results: float
    weights: tuple[float, ...]


class _Walk:
    def __init__(self, graph: Graph, layout: Layout, impl: Implementation, gradient_bytes: int) -> None:
        self.graph, self.layout, self.impl, self.gradient_bytes = graph, layout, impl, gradient_bytes
        kept = kept_tensors(graph, impl)
        self.kept = {name: self._size(tensor) for name, (tensor, _) in kept.items()}
        self.users = {
            name: {op.name for op in graph.operators for t in op.saved(impl) if self._key(t) == name} for name in kept
        }

    @staticmethod
    def _key(tensor: Tensor) -> str:
        return f"{tensor.name}, gathered" if tensor.gathered else tensor.name

    def _size(self, tensor: Tensor) -> float:
        return self.layout.elements(tensor) * self.impl.bytes_of(tensor)

    def _gradient(self, operator: Operator, tensor: Tensor) -> float:
        """Bytes of a gradient where an operator reads or writes the tensor: products have all tokens."""
        if tensor.dtype in ("index", "mask"):
            return 0.0
        split = self.layout.elements(tensor)
        touching = (*operator.inputs, *operator.outputs)
        if isinstance(operator, Projection) and any(t.tp_sharded for t in touching) and self.layout.sequence_parallel:
            split = self.layout.tokens(tensor, gathered=True) * self.layout.width(tensor.axes)
        return split * (self.impl.bytes_of(tensor) if tensor.dtype != "logits" else self.impl.activation_bytes)

    def steps(self) -> Iterator[Step]:
        """The operators backward: autograd frees what one kept after it."""
        stream = self._size(self.graph.output)
        left = sum(self.kept.values())
        waiting: dict[str, float] = {}
        for operator in reversed(self.graph.operators):
            if isinstance(operator, Residual | Loss):
                continue  # hands the gradient of the stream on
            outs = sum(
                waiting.pop(
                    t.name,
                    0.0 if self._is_branch(t) and not self.layout.sequence_parallel else self._gradient(operator, t),
                )
                for t in operator.outputs
            )
            ins = {t.name: self._gradient(operator, t) for t in operator.inputs}
            own = self._weight_gradients(operator)
            extra = self._extra(operator) + (max(ins.values(), default=0.0) if len(own) > 1 else 0.0)
            moving = stream + sum(waiting.values()) + outs + sum(ins.values()) + extra
            during = left + moving
            for name, users in self.users.items():
                if operator.name in users:
                    users.discard(operator.name)
                    if not users:
                        left -= self.kept[name]
            for name, size in ins.items():
                if name != self.graph.input.name and not self._is_stream(name):
                    waiting[name] = size
            yield Step(
                operator=operator,
                during=during,
                after=left + stream + sum(waiting.values()),
                moving=moving,
                results=sum(self._gradient(operator, t) for t in operator.outputs),
                weights=tuple(own),
            )

    @property
    def start(self) -> float:
        """Everything that was kept, and the gradient that comes in."""
        return sum(self.kept.values()) + self._size(self.graph.output)

    def _is_branch(self, tensor: Tensor) -> bool:
        """A result that is added to the stream: its gradient is that of the stream."""
        return any(isinstance(op, Residual) and tensor in op.inputs for op in self.graph.operators)

    def _is_stream(self, name: str) -> bool:
        return any(isinstance(op, Residual) and name in {t.name for t in op.outputs} for op in self.graph.operators)

    def _weight_gradients(self, operator: Operator) -> list[float]:
        return [self.layout.weight_elements(w) * self.gradient_bytes for w in operator.weights if len(w.axes) > 1]

    def _extra(self, operator: Operator) -> float:
        """Temporaries of chains of single operators, beside the gradients of inputs and outputs."""
        elements = self.layout.elements
        if isinstance(operator, Norm) and operator.kind == "rmsnorm" and self.impl.norm == "eager":
            return 2 * 4 * elements(operator.inputs[0])
        if isinstance(operator, Attention) and self.impl.attention == "unfused":
            softmax = next(t for t in operator.saved(self.impl) if t.name.endswith(".softmax"))
            return 8.0 * elements(softmax)
        if isinstance(operator, Rope):
            return max(self._size(t) for t in operator.inputs)
        if isinstance(operator, Combine):
            return 4.0 * elements(operator.inputs[0])
        return 0.0


def backward_peak(
    graph: Graph, layout: Layout, impl: Implementation, gradient_bytes: int, keeps_gradients: bool
) -> float:
    """Most bytes at once while a block goes backward: what it kept, and gradients of tensors and weights.

    Parameters
    ----------
    graph : Graph
    layout : Layout
    impl : Implementation
    gradient_bytes : int
        Of an element of a weight's gradient as autograd makes it.
    keeps_gradients : bool
        Gradients of whole weights stay until the block is through (FSDP2); otherwise each is added to a buffer.
    """
    walk = _Walk(graph, layout, impl, gradient_bytes)
    peak, made = walk.start, 0.0
    for step in walk.steps():
        peak = max(peak, step.during + made + max(step.weights, default=0.0))
        made += sum(step.weights) if keeps_gradients else 0.0
    return peak


def backward_steps(graph: Graph, layout: Layout, impl: Implementation, gradient_bytes: int) -> list[Step]:
    """The backward pass of a block operator by operator; parameters as of `backward_peak`."""
    return list(_Walk(graph, layout, impl, gradient_bytes).steps())


def input_gradient_peak(
    graphs: Iterable[Graph], layout: Layout, impl: Implementation, gradient_bytes: int
) -> tuple[float, float]:
    """Of the first half of a split backward pass, bytes beside what was kept: at the most, and at the end.

    PyTorch frees nothing of the graph, and the gradients that reach operators with weights wait for the second half.

    Parameters
    ----------
    graphs : iterable of Graph
        Blocks in the order of the forward pass.
    layout, impl, gradient_bytes
        As of `backward_peak`.
    """
    peak = pending = 0.0
    for graph in reversed(list(graphs)):
        # Results that one sum takes have one gradient, unless each is gathered for its product.
        sums = [{t.name for t in op.inputs} for op in graph.operators if isinstance(op, Residual)]
        counted: list[set[str]] = []
        for step in backward_steps(graph, layout, impl, gradient_bytes):
            peak = max(peak, pending + step.moving + _chain_gradients(step.operator, layout, impl))
            if not step.operator.weights:
                continue
            shared = [names for names in sums if any(t.name in names for t in step.operator.outputs)]
            if layout.sequence_parallel or not any(names in counted for names in shared):
                pending += step.results
            counted += shared
    return peak, pending


def _chain_gradients(operator: Operator, layout: Layout, impl: Implementation) -> float:
    """Gradients inside of a function that is a chain of operators: of each result between them, and a power's."""
    if not isinstance(operator, Activation):
        return 0.0
    ends = {t.name for t in (*operator.inputs, *operator.outputs)}
    between = [t for t in operator.saved(impl) if t.name not in ends]
    return sum(float(layout.elements(t) * impl.bytes_of(t)) for t in (*between, *between[:1]))


def loss_workspace(head: Graph, layout: Layout, split: bool) -> float:
    """Bytes beside what the head kept when the loss goes backward, the widest moment of cross-entropy in float32.

    The gradient of the log-probabilities and that of the logits; one more where the vocabulary is split over ranks.
    """
    return (3 if split else 2) * logits_bytes(head, layout)


def logits_bytes(head: Graph, layout: Layout) -> float:
    """Bytes of a micro-batch's logits in float32."""
    logits = next(t for op in head.operators for t in op.inputs if t.dtype == "logits")
    return 4.0 * layout.elements(logits)
