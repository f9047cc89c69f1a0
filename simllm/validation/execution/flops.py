"""FLOPs of a rank as PyTorch's formulas count them, recomputation included."""

from __future__ import annotations

from simllm.models.activations import Recompute, recomputed_operators
from simllm.models.graph import Graph, Operator
from simllm.models.operators import Attention, Projection
from simllm.models.work import AttentionWork
from simllm.validation.execution.rank_view import RankView, operator_named

__all__ = ["flops", "rerun"]


def flops(at: RankView) -> int:
    """FLOPs of matrix products and attention in a step of a rank."""
    layout, impl = at.layout, at.impl
    total = again = scores = 0
    for graph, policy in at.blocks:
        again_too, skipped = rerun(at, graph, policy)
        for operator in graph.operators:
            forward = sum(work.flops for work in operator.forward(layout, impl))
            backward = operator.backward_input(layout, impl) + operator.backward_weight(layout, impl)
            total += forward + sum(work.flops for work in backward)
            if operator.name in again_too:
                total += forward
            elif operator.name in skipped:
                again += forward
            if isinstance(operator, Attention):
                work = operator.forward(layout, impl)[0]
                assert isinstance(work, AttentionWork)
                product = work.flops * work.head_dim // (work.head_dim + work.v_head_dim)
                if impl.attention == "flash":
                    scores += product
                elif policy.kind == "selective":
                    # The explicit core runs again up to the softmax; its last product only needs what that keeps.
                    total += product
                    again += forward - product
    at.term(
        "FLOPs",
        -again * at.m if again else 0,
        "torch.utils.checkpoint stops before what nobody keeps: the last product of a layer does not run again",
    )
    if scores:
        why = "the fused kernel's formula counts the scores that it computes again in its backward pass"
        total += at.term("FLOPs", scores * at.m, why) // at.m
    return total * at.m


def rerun(at: RankView, graph: Graph, policy: Recompute) -> tuple[set[str], set[str]]:
    """Operators that run again, and those that the policy names but early stopping spares."""
    named = [operator.name for operator in recomputed_operators(graph, policy, at.impl)]
    if policy.kind == "selective":
        return set(), set()
    keeping = [op.name for op in graph.operators if op.name in named and _keeps(at, op)]
    if not keeping:
        return set(), set(named)
    last = named.index(keeping[-1])
    stop = last if isinstance(operator_named(graph, keeping[-1]), Projection) else last + 1
    return set(named[:stop]), set(named[stop:])


def _keeps(at: RankView, operator: Operator) -> bool:
    return bool(operator.saved(at.impl))
