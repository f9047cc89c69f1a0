"""Which collectives a block needs on its rank: read off the sharding of its tensors, not written down by hand.

Rules (arXiv:1909.08053 section 3, arXiv:2205.05198 section 4.2):

- a product whose contracted axis is sharded over tp leaves partial sums; the first operator after it that is not a
  product reduces them once: all-reduce, or reduce-scatter over the sequence with sequence parallelism;
- a product whose output axis is sharded over tp enters the tensor-parallel region: with sequence parallelism its input
  is all-gathered (and, unless the software keeps it, again in the backward pass for the weight gradient), and the
  gradient of its input is reduced. Products that read the same tensor share these;
- a whole tensor that every head uses (the rotated part of a latent key) enters the tensor-parallel region likewise;
- a loss over a vocabulary that is split needs the maximum, the sum of exponentials and the label's logit of each token
  from all ranks, in float32 (arXiv:1909.08053, section 3);
- tokens sent to experts cross the expert-parallel ranks by all-to-all, twice forward and twice backward; expert-tensor
  ranks gather and scatter them;
- keys and values go round the context-parallel ring, their gradients with them in the backward pass; or they are
  gathered, again in the backward pass, and their gradients reduced and scattered (arXiv:2407.21783, section 3.3.2); or
  queries, keys, values and output are exchanged for heads and back, with four all-to-alls a pass (arXiv:2309.14509,
  section 3.2);
- what serves a gradient that nobody asks for, before the first trained weight, is not exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from simllm.models.context import ContextBytes
from simllm.models.graph import Graph, Implementation, Layout, Operator, Tensor
from simllm.models.operators import Attention, Combine, Dispatch, Embedding, Loss, Projection, Rope

__all__ = ["Collective", "block_collectives"]

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
GroupName = Literal["tp", "cp", "cp_heads", "cp_ring", "ep", "etp"]
Phase = Literal["forward", "backward"]

_PHASES: tuple[Phase, Phase] = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of one micro-batch in one block.

    ``size_bytes`` is what nccl-tests prints: the buffer of an all-reduce, the total of an all-gather or
    reduce-scatter, the send buffer of an all-to-all or a send. ``count`` equal calls follow each other.
    """

    op: Operation
    group: GroupName
    phase: Phase
    size_bytes: float
    operator: str
    count: int = 1


class _Reader:
    def __init__(self, graph: Graph, layout: Layout, impl: Implementation) -> None:
        self.graph, self.layout, self.impl = graph, layout, impl
        self.found: list[Collective] = []
        self.partial: set[str] = set()
        self.entered: set[str] = set()

    def add(
        self, op: Operation, group: GroupName, phase: Phase, size: float, operator: Operator, count: int = 1
    ) -> None:
        if phase == "backward" and not self.graph.runs_backward(operator):
            return
        self.found.append(
            Collective(op=op, group=group, phase=phase, size_bytes=size, operator=operator.name, count=count)
        )

    def full_bytes(self, tensor: Tensor) -> float:
        """Bytes of a tensor with all the tokens of the tp group."""
        layout = self.layout
        return layout.tokens(tensor, gathered=True) * layout.width(tensor.axes) * self.impl.activation_bytes

    def reduce(self, tensor: Tensor, operator: Operator) -> None:
        size = self.full_bytes(tensor)
        if self.layout.sequence_parallel:
            self.add("reduce_scatter", "tp", "forward", size, operator)
            self.add("all_gather", "tp", "backward", size, operator)
        else:
            self.add("all_reduce", "tp", "forward", size, operator)

    def enter(self, tensor: Tensor, operator: Operator) -> None:
        if tensor.name in self.entered:
            return
        self.entered.add(tensor.name)
        size = self.full_bytes(tensor)
        # A matrix needs its input again for its own gradient, unless it is frozen; the input's gradient is asked for
        # where something before it is trained.
        again = not operator.weights or any(weight.trained and len(weight.axes) > 1 for weight in operator.weights)
        through = tensor.name in self.graph.differentiated
        if self.layout.sequence_parallel:
            self.add("all_gather", "tp", "forward", size, operator)
            if again and self.impl.sequence_gather == "again":
                self.add("all_gather", "tp", "backward", size, operator)
            if through:
                self.add("reduce_scatter", "tp", "backward", size, operator)
        elif through:
            self.add("all_reduce", "tp", "backward", size, operator)

    def read(self, operator: Operator) -> None:
        layout = self.layout
        if layout.tp > 1:
            self._tensor_parallel(operator)
        if isinstance(operator, Dispatch | Combine):
            self._experts(operator)
        if layout.cp > 1 and isinstance(operator, Attention):
            self._context(operator)

    def _tensor_parallel(self, operator: Operator) -> None:
        product = isinstance(operator, Projection)
        waiting = [tensor for tensor in operator.inputs if tensor.name in self.partial]
        if waiting and not product:
            self.reduce(waiting[0], operator)
        if product:
            x, sharded_out = operator.inputs[0], any(out.tp_sharded for out in operator.outputs)
            if x.tp_sharded and not sharded_out:
                self.partial.update(out.name for out in operator.outputs)
            elif sharded_out and not x.tp_sharded:
                self.enter(x, operator)
            elif x.name in self.partial:
                # A product of partial sums leaves partial sums.
                self.partial.update(out.name for out in operator.outputs)
        elif isinstance(operator, Rope):
            for x in operator.inputs:
                if not x.tp_sharded:
                    self.enter(x, operator)
        elif isinstance(operator, Loss) and operator.inputs[0].tp_sharded:
            self.add("all_reduce", "tp", "forward", 4 * self.layout.tokens(operator.inputs[0]), operator, 3)
        elif isinstance(operator, Embedding) and any(w.axes[0].name == "vocab" for w in operator.weights):
            self.partial.update(out.name for out in operator.outputs)

    def _experts(self, operator: Operator) -> None:
        layout = self.layout
        routed = operator.outputs[0] if isinstance(operator, Dispatch) else operator.inputs[0]
        shared = layout.elements(routed) * self.impl.activation_bytes
        own = shared / layout.etp
        for phase in _PHASES:
            if layout.ep > 1:
                self.add("all_to_all", "ep", phase, own, operator)
            if layout.etp > 1:
                outward = isinstance(operator, Dispatch) == (phase == "forward")
                self.add("all_gather" if outward else "reduce_scatter", "etp", phase, shared, operator)

    def _context(self, operator: Attention) -> None:
        layout, sizes = self.layout, operator.context_bytes(self.layout, self.impl)
        parts = layout.cp_parts
        if layout.cp_heads > 1:
            self._exchange(operator, sizes, "cp" if parts == 1 else "cp_heads")
        if parts == 1:
            return
        group: GroupName = "cp" if layout.cp_heads == 1 else "cp_ring"
        keys = sizes.k + sizes.v
        together = self.impl.context_steps == "fused"
        if layout.cp_gathers:
            for size in (sizes.k, sizes.v):
                for phase in _PHASES:
                    self.add("all_gather", group, phase, parts * size, operator)
                if together:
                    self.add("reduce_scatter", group, "backward", parts * size, operator)
        else:
            self.add("send_recv", group, "forward", keys, operator, parts - 1)
            # Keys and values need not come home, nor does a gradient start before the first step: both make one hop
            # less than there are ranks.
            self.add("send_recv", group, "backward", 2 * keys if together else keys, operator, parts - 1)
        if not together:
            self.add("send_recv", group, "backward", keys * 4 / self.impl.activation_bytes, operator, parts)

    def _exchange(self, operator: Attention, sizes: ContextBytes, group: GroupName) -> None:
        for phase in _PHASES:
            for size in sizes:
                self.add("all_to_all", group, phase, size, operator)
        if self.impl.context_output == "again":
            self.add("all_to_all", group, "backward", sizes.out, operator)

    def finish(self, graph: Graph) -> None:
        if graph.output.name in self.partial:
            self.reduce(graph.output, graph.operators[-1])


@lru_cache(maxsize=65536)
def block_collectives(graph: Graph, layout: Layout, impl: Implementation) -> tuple[Collective, ...]:
    """The collectives of one block for one micro-batch, in the order of its operators.

    Parameters
    ----------
    graph : Graph
    layout : Layout
        Degrees of the rank.
    impl : Implementation

    Returns
    -------
    tuple of Collective
    """
    reader = _Reader(graph, layout, impl)
    for operator in graph.operators:
        reader.read(operator)
    reader.finish(graph)
    return tuple(reader.found)
