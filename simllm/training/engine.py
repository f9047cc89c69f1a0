"""The price of one block of a model on one rank: its operators on the accelerator, its collectives on the network.

An `Engine` binds a cluster, a software stack and a precision. It prices a block once for every distinct shape; a search
over plans mostly finds the blocks it needs already priced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import add

from simllm.hardware import Cluster
from simllm.hardware.stack import Stack
from simllm.kernels import Kernels
from simllm.models.activations import Recompute, recomputed_operators
from simllm.models.graph import Graph, Implementation, Layout, Operator
from simllm.models.operators import Combine, Dispatch, GroupedProjection
from simllm.models.work import AttentionWork, Gemm, GroupedGemm, Work
from simllm.network import Group, price
from simllm.parallel.communication import Collective, block_collectives
from simllm.training.cost import Cost
from simllm.training.exposure import exposed, launch_s

__all__ = ["BlockCost", "BlockGroups", "Engine", "implementation_of"]

#: Operators that stay in 16 bits when the layers' matrix products run in 8 or 4 (Micikevicius 2022, arXiv:2209.05433).
_HIGH_PRECISION_COMPONENTS = frozenset({"head", "router", "head_transform"})

#: Components of operators that stand beside those of the model itself.
_ADDED_COMPONENTS = frozenset({"adapter", "prompt"})


@dataclass(frozen=True, slots=True)
class BlockGroups:
    """The groups that the collectives of a block run over."""

    tp: Group
    cp: Group
    cp_heads: Group
    cp_ring: Group
    ep: Group
    etp: Group


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Seconds of one block for one micro-batch: forward, and backward with what is recomputed.

    ``weight_s``: what of the backward makes gradients of weights, which nothing waits for.
    """

    forward: Cost
    backward: Cost
    weight_s: float


def implementation_of(stack: Stack, kernels: Kernels, precision: str) -> Implementation:
    """What a stack fuses, in the terms of the graph."""
    return Implementation(
        attention="unfused" if attention_kernel(stack, kernels, precision)[0] == "unfused" else "flash",
        activation=stack.kernels.activation,
        norm=stack.kernels.norm,
        rope=stack.kernels.rope,
        dropout_add=stack.kernels.dropout_add,
        sequence_gather=stack.kernels.sequence_gather,
        context_output=stack.kernels.context_output,
        context_steps=stack.kernels.context_steps,
        router_weights=stack.kernels.router_weights,
        expert_extras=stack.kernels.expert_extras,
        activation_bytes=4 if precision in ("fp32", "tf32") else 2,
        logits_saved_bytes=stack.costs.logits_saved.si,
        loss_traffic_bytes=stack.costs.loss_traffic.si,
    )


def attention_kernel(stack: Stack, kernels: Kernels, precision: str) -> tuple[str, str | None]:
    """The attention kernel of a stack on a device, and what had to be assumed for it."""
    wanted = stack.kernels.attention
    best = kernels.default_attention
    if precision in ("fp32", "tf32") and (wanted != "best" or precision not in kernels.attention_precisions(best)):
        return "unfused", f"attention in {precision} runs unfused: fused kernels are for 16 bits"
    if wanted == "best":
        return kernels.default_attention, None
    if wanted in kernels.attention_implementations:
        return wanted, None
    return kernels.default_attention, (
        f"{wanted} was not measured on {kernels.accelerator.name}; {kernels.default_attention} stands in"
    )


def _own_operators(graph: Graph) -> int:
    """Operators of a layer without those that stand beside the model's own."""
    return sum(operator.component not in _ADDED_COMPONENTS for operator in graph.operators)


def stream_kind(operator: Operator, backward: bool = False) -> str:
    """What a kernel profile calls the streaming kernels of an operator: ``norm forward``."""
    return f"{type(operator).__name__.lower()} {'backward' if backward else 'forward'}"


class Engine:
    """Prices blocks on one cluster with one software stack in one precision.

    Parameters
    ----------
    cluster : Cluster
    stack : Stack
    precision : str
        Of the layers' matrix products.
    """

    def __init__(self, cluster: Cluster, stack: Stack, precision: str) -> None:
        self.cluster, self.stack, self.precision = cluster, stack, precision
        self.kernels = Kernels(cluster.accelerator)
        self.high_precision = precision if precision in ("fp32", "tf32", "fp16") else "bf16"
        if self.high_precision == "bf16" and "bf16" not in self.kernels.precisions:
            self.high_precision = "fp16"
        self.attention, self._attention_note = attention_kernel(stack, self.kernels, precision)
        self.attention_rate = stack.kernels.attention_rate.si
        self.impl = implementation_of(stack, self.kernels, precision)
        self.block = lru_cache(maxsize=1 << 16)(self._block)
        self._operators = lru_cache(maxsize=1 << 14)(self._price_operators)
        self._passes = lru_cache(maxsize=1 << 15)(self._price_passes)
        self._again = lru_cache(maxsize=1 << 15)(self._price_again)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What stands in for a measurement."""
        note = (self._attention_note,) if self._attention_note else ()
        return (*self.kernels.assumptions, *note)

    # -- operators ---------------------------------------------------------------------------------------------

    def _price_work(
        self,
        items: Iterable[Work],
        precision: str,
        permute: float,
        products: int,
        kind: str,
        quantise: str | None = None,
    ) -> Cost:
        kernels = self.kernels
        matmul = attention = elementwise = 0.0
        for item in items:
            if isinstance(item, Gemm):
                matmul += kernels.matmul(item.m, item.n, item.k, precision, item.times, quantise)
            elif isinstance(item, GroupedGemm):
                matmul += kernels.grouped_matmul(item.tokens, item.n, item.k, item.groups, precision, quantise)
            elif isinstance(item, AttentionWork):
                attention += item.times * self._price_attention(item, products)
            else:
                # Every kernel of a chain moves its part of the bytes; small ones cost their launch.
                elementwise += item.kernels * kernels.memory_bound(permute * item.bytes / max(1, item.kernels), kind)
        return Cost(matmul=matmul, attention=attention, elementwise=elementwise)

    def _price_attention(self, work: AttentionWork, products: int) -> float:
        fraction = min(1.0, work.pairs / (work.seq_q * work.seq_k))
        seconds = self.kernels.attention(
            work.batch,
            work.heads,
            work.kv_heads,
            work.seq_q,
            work.seq_k,
            work.head_dim,
            work.v_head_dim,
            fraction,
            self.attention,
            "forward" if products == 2 else "backward",
            self.high_precision,
            # The graph counts the traffic of softmax and dropout as streams of its own.
            0.0 if self.attention == "unfused" else None,
        )
        return seconds / self.attention_rate

    def operator_forward(self, operator: Operator, layout: Layout) -> Cost:
        """Seconds of one operator forward."""
        precision, permute = self._treatment(operator)
        work = operator.forward(layout, self.impl)
        return self._price_work(work, precision, permute, 2, stream_kind(operator)) + self._launches(
            operator, layout, work
        )

    def operator_backward(self, operator: Operator, layout: Layout, through: bool = True) -> tuple[Cost, Cost]:
        """Seconds of the gradients of one operator's inputs, where they are asked for, and of its weights."""
        precision, permute = self._treatment(operator)
        kind = stream_kind(operator, backward=True)
        inputs = operator.backward_input(layout, self.impl) if through else ()
        weights = operator.backward_weight(layout, self.impl)
        # Both operands of a weight's gradient are quantised by then, along both axes at once: the input in the forward
        # pass, the output's gradient for the gradient of the input.
        return (
            self._price_work(inputs, precision, permute, 4, kind) + self._launches(operator, layout, inputs),
            self._price_work(weights, precision, permute, 4, kind, "none") + self._launches(operator, layout, weights),
        )

    def _launches(self, operator: Operator, layout: Layout, work: Iterable[Work]) -> Cost:
        """What the host needs where products of experts are launched expert by expert.

        A product in 16 bits is one kernel; in fewer its operand is quantised and the scales are arranged before it.
        """
        each = self.stack.costs.expert_launch
        if each is None or not isinstance(operator, GroupedProjection):
            return Cost()
        groups = next(layout.size(weight.axes[0]) for weight in operator.weights)
        kernels = 1 if self.precision == self.high_precision else 3
        products = sum(isinstance(item, Gemm | GroupedGemm) for item in work)
        return Cost(host=products * groups * kernels * each.si)

    def _treatment(self, operator: Operator) -> tuple[str, float]:
        high = operator.component in _HIGH_PRECISION_COMPONENTS
        permute = self.stack.costs.moe_permute_traffic.si if isinstance(operator, Dispatch | Combine) else 1.0
        return (self.high_precision if high else self.precision), permute

    # -- collectives -------------------------------------------------------------------------------------------

    def hop(self, collective: Collective, groups: BlockGroups) -> Group:
        """The ranks that one call of a collective runs over: its group, or one hop of a ring.

        In a ring every rank sends to its neighbour at once; the slowest hop is the one that leaves the domain.
        """
        group: Group = getattr(groups, collective.group)
        if collective.op != "send_recv":
            return group
        reach = (group.size - 1) * group.stride
        leaves = reach >= self.cluster.gpus_per_domain
        return Group(size=2, stride=max(group.stride, self.cluster.gpus_per_domain) if leaves else group.stride)

    def collective_s(self, collective: Collective, groups: BlockGroups) -> float:
        """Seconds of a collective of a block, as if nothing ran beside it."""
        group = self.hop(collective, groups)
        return collective.count * price(collective.op, collective.size_bytes, self.cluster, group).time_s

    def _communication(self, collectives: Iterable[Collective], groups: BlockGroups, attention_s: float) -> Cost:
        overlap = self.stack.overlap
        tensor = expert = ring = gathered = exchanged = 0.0
        for collective in collectives:
            seconds = self.collective_s(collective, groups)
            if collective.group == "tp":
                tensor += seconds * overlap.tensor_parallel_exposed.si
            elif collective.group in ("ep", "etp"):
                expert += seconds * overlap.expert_parallel_exposed.si
            elif collective.op == "send_recv":
                ring += seconds
            elif collective.op == "all_to_all":
                exchanged += seconds
            else:
                gathered += seconds
        visible = exchanged + exposed(ring, attention_s, overlap.context_parallel_exposed.si)
        if gathered:
            # Keys of other ranks can come while a rank attends to its own.
            visible += exposed(gathered, attention_s / groups.cp.size, overlap.context_gather_exposed.si)
        return Cost(tensor_parallel=tensor, expert_parallel=expert, context_parallel=visible)

    # -- blocks ------------------------------------------------------------------------------------------------

    def _block(self, graph: Graph, layout: Layout, groups: BlockGroups, policy: Recompute, is_layer: bool) -> BlockCost:
        forward, backward, weight_s = self._passes(graph, layout, groups, is_layer)
        if not is_layer or policy.kind == "none":
            return BlockCost(forward, backward, weight_s)
        # With every n-th layer recomputed, an average layer runs that part of it again.
        again = self._again(graph, layout, groups, replace(policy, every=1))
        return BlockCost(forward, backward + Cost(recompute=again * policy.fraction), weight_s)

    def _price_operators(self, graph: Graph, layout: Layout) -> tuple[Cost, ...]:
        return tuple(self.operator_forward(operator, layout) for operator in graph.operators)

    def _price_passes(
        self, graph: Graph, layout: Layout, groups: BlockGroups, is_layer: bool
    ) -> tuple[Cost, Cost, float]:
        """Forward and backward of a block, nothing recomputed, and the seconds of its weights' gradients."""
        collectives = block_collectives(graph, layout, self.impl)
        forward = reduce(add, self._operators(graph, layout), Cost())
        reversed_too = [operator for operator in graph.operators if graph.runs_backward(operator)]
        gradients = [
            self.operator_backward(operator, layout, graph.needs_input_gradient(operator)) for operator in reversed_too
        ]
        weights = reduce(add, (of_weights for _, of_weights in gradients), Cost())
        backward = reduce(add, (of_inputs for of_inputs, _ in gradients), weights)
        ahead = [c for c in collectives if c.phase == "forward"]
        behind = [c for c in collectives if c.phase == "backward"]
        forward += self._communication(ahead, groups, forward.attention)
        backward += self._communication(behind, groups, backward.attention)
        if is_layer:
            ratio = self.stack.costs.host_backward_ratio.si
            forward += self._host(graph.operators, graph, forward)
            backward += self._host(reversed_too, graph, backward, ratio)
        return forward, backward, weights.total

    def _price_again(self, graph: Graph, layout: Layout, groups: BlockGroups, policy: Recompute) -> float:
        """Seconds of what a recomputed layer runs again."""
        rerun = recomputed_operators(graph, policy, self.impl)
        if not rerun:
            return 0.0
        known = self._operators(graph, layout) if rerun is graph.operators else None
        again = reduce(add, known or (self.operator_forward(operator, layout) for operator in rerun), Cost())
        names = {operator.name for operator in rerun}
        collectives = block_collectives(graph, layout, self.impl)
        ahead = [c for c in collectives if c.phase == "forward" and c.operator in names]
        again += self._communication(ahead, groups, again.attention)
        return (again + self._host(rerun, graph, again)).total

    def _host(self, operators: Sequence[Operator], graph: Graph, cost: Cost, ratio: float = 1.0) -> Cost:
        """What the host adds to the kernels of a layer's operators: launches that show, and waits for routed counts.

        The figures of a stack are for a layer's own operators: what is added to it is launched too, and what a pass
        leaves out is not. ``ratio`` is a launch of the pass over one of the forward pass.
        """
        costs = self.stack.costs
        launched = ratio * costs.host_per_layer_forward.si * len(operators) / _own_operators(graph)
        seconds = launch_s(launched, cost.total - cost.host, costs.host_join.si)
        if costs.expert_wait is not None and any(isinstance(operator, Dispatch) for operator in operators):
            seconds += ratio * costs.expert_wait.si
        return Cost(host=seconds)

    def stream_s(self, size_bytes: float, kind: str = "") -> float:
        """Seconds of a kernel of a kind that moves so many bytes."""
        return self.kernels.memory_bound(size_bytes, kind)
