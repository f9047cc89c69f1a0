"""The price of one block of a model on one rank: its operators on the accelerator, its collectives on the network.

An `Engine` binds a cluster, a software stack and a precision. It prices a block once for every distinct shape; a search
over plans mostly finds the blocks it needs already priced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from simllm.hardware import Cluster
from simllm.hardware.stack import Stack
from simllm.kernels import Kernels
from simllm.models.activations import Recompute, recomputed_operators
from simllm.models.graph import Graph, Implementation, Layout, Operator
from simllm.models.operators import Combine, Dispatch
from simllm.models.work import AttentionWork, Gemm, GroupedGemm, Work
from simllm.network import Group, price
from simllm.parallel.communication import Collective, block_collectives
from simllm.training.cost import Cost

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
    ep: Group
    etp: Group


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Seconds of one block for one micro-batch: forward, and backward with what is recomputed."""

    forward: Cost
    backward: Cost


def implementation_of(stack: Stack, kernels: Kernels, precision: str) -> Implementation:
    """What a stack fuses, in the terms of the graph."""
    return Implementation(
        attention="unfused" if attention_kernel(stack, kernels, precision)[0] == "unfused" else "flash",
        activation=stack.kernels.activation,
        norm=stack.kernels.norm,
        rope=stack.kernels.rope,
        dropout_add=stack.kernels.dropout_add,
        sequence_gather=stack.kernels.sequence_gather,
        router_weights=stack.kernels.router_weights,
        activation_bytes=4 if precision in ("fp32", "tf32") else 2,
        logits_saved_bytes=stack.costs.logits_saved.si,
        loss_traffic_bytes=stack.costs.loss_traffic.si,
    )


def attention_kernel(stack: Stack, kernels: Kernels, precision: str) -> tuple[str, str | None]:
    """The attention kernel of a stack on a device, and what had to be assumed for it."""
    wanted = stack.kernels.attention
    if precision in ("fp32", "tf32"):
        return "unfused", f"attention in {precision} runs unfused: fused kernels are for 16 bits"
    if wanted == "best":
        return kernels.default_attention, None
    if wanted in kernels.attention_implementations:
        return wanted, None
    return kernels.default_attention, (
        f"{wanted} was not measured on {kernels.accelerator.name}; {kernels.default_attention} stands in"
    )


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

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What stands in for a measurement."""
        note = (self._attention_note,) if self._attention_note else ()
        return (*self.kernels.assumptions, *note)

    # -- operators ---------------------------------------------------------------------------------------------

    def _price_work(self, items: Iterable[Work], precision: str, permute: float, products: int) -> Cost:
        kernels = self.kernels
        matmul = attention = elementwise = 0.0
        for item in items:
            if isinstance(item, Gemm):
                matmul += kernels.matmul(item.m, item.n, item.k, precision, item.times)
            elif isinstance(item, GroupedGemm):
                matmul += kernels.grouped_matmul(item.tokens, item.n, item.k, item.groups, precision)
            elif isinstance(item, AttentionWork):
                attention += self._price_attention(item, products)
            else:
                # Every kernel of a chain moves its part of the bytes; small ones cost their launch.
                elementwise += item.kernels * kernels.memory_bound(permute * item.bytes / max(1, item.kernels))
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
        return self._price_work(operator.forward(layout, self.impl), precision, permute, 2)

    def operator_backward(self, operator: Operator, layout: Layout, through: bool = True) -> Cost:
        """Seconds of the gradients of one operator's weights and, where they are asked for, of its inputs."""
        precision, permute = self._treatment(operator)
        work = operator.backward_input(layout, self.impl) if through else ()
        work += operator.backward_weight(layout, self.impl)
        return self._price_work(work, precision, permute, 4)

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
        tensor = expert = ring = 0.0
        for collective in collectives:
            seconds = self.collective_s(collective, groups)
            if collective.group == "tp":
                tensor += seconds * overlap.tensor_parallel_exposed.si
            elif collective.group == "cp":
                ring += seconds
            else:
                expert += seconds * overlap.expert_parallel_exposed.si
        visible = max(0.0, ring - attention_s) + overlap.context_parallel_exposed.si * min(ring, attention_s)
        return Cost(tensor_parallel=tensor, expert_parallel=expert, context_parallel=visible)

    # -- blocks ------------------------------------------------------------------------------------------------

    def _block(self, graph: Graph, layout: Layout, groups: BlockGroups, policy: Recompute, is_layer: bool) -> BlockCost:
        collectives = block_collectives(graph, layout, self.impl)
        forward = backward = again = Cost()
        rerun = {operator.name for operator in recomputed_operators(graph, policy, self.impl)} if is_layer else set()
        for operator in graph.operators:
            cost = self.operator_forward(operator, layout)
            forward += cost
            if operator.name in rerun:
                again += cost
            if graph.runs_backward(operator):
                backward += self.operator_backward(operator, layout, graph.needs_input_gradient(operator))
        ahead = [c for c in collectives if c.phase == "forward"]
        behind = [c for c in collectives if c.phase == "backward"]
        forward += self._communication(ahead, groups, forward.attention)
        backward += self._communication(behind, groups, backward.attention)
        if rerun:
            again += self._communication([c for c in ahead if c.operator in rerun], groups, again.attention)
        if is_layer:
            host = self.stack.costs.host_per_layer_forward.si
            ratio = self.stack.costs.host_backward_ratio.si
            # The figures are for the operators of a layer: what is added to it is launched too, what does not run
            # backward is not.
            own = sum(operator.component not in _ADDED_COMPONENTS for operator in graph.operators)
            added = len(graph.operators) / own
            behind_share = sum(graph.runs_backward(operator) for operator in graph.operators) / own
            forward += Cost(host=max(0.0, host * added - forward.total))
            backward += Cost(host=max(0.0, host * ratio * behind_share - backward.total))
            if rerun:
                share = len(rerun) / len(graph.operators)
                again += Cost(host=max(0.0, host * added * share - again.total))
        # With every n-th layer recomputed, an average layer runs that part of it again.
        return BlockCost(forward, backward + Cost(recompute=again.total * policy.fraction))

    def stream_s(self, size_bytes: float) -> float:
        """Seconds of a kernel that moves so many bytes."""
        return self.kernels.memory_bound(size_bytes)
