"""Which ranks of a plan form which group: tensor parallelism innermost, then context, data, pipeline.

Neighbouring ranks share a node, so the axis that talks most comes first (arXiv:2104.04473, section 3.2). Of a context
group the ranks that trade tokens for heads are neighbours, and a ring joins those of the same heads (arXiv:2405.07719).
Expert groups are laid over the tensor x context x data ranks of a stage: expert-tensor ranks innermost, then experts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from simllm.elementwise import Degree
from simllm.network import Group
from simllm.parallel.plan import Plan

__all__ = ["GroupRole", "communicators", "group_of"]

GroupRole = Literal[
    "tp", "cp", "cp_heads", "cp_ring", "pp", "dp", "ep", "etp", "expert_dp", "hsdp_shard", "hsdp_replicate"
]


@lru_cache(maxsize=1 << 16)
def group_of(plan: Plan, role: GroupRole, hsdp_shard: int = 0) -> Group:
    """The group of a role.

    ``dp`` is the group that dense gradients are reduced over: data and context ranks. ``pp`` is one pair of
    neighbouring stages. ``expert_dp`` holds the replicas of one expert's weights.

    >>> group_of(Plan(tp=8, pp=2, dp=4, global_batch_size=4, sequence_parallel=True), "dp")
    Group(size=4, stride=8)
    """
    tp, stage = plan.tp, plan.tp * plan.cp * plan.dp
    if role == "tp":
        return Group(size=tp)
    if role == "cp":
        return Group(size=plan.cp, stride=tp)
    if role == "cp_heads":
        return Group(size=plan.cp_heads, stride=tp)
    if role == "cp_ring":
        return Group(size=plan.cp // plan.cp_heads, stride=tp * plan.cp_heads)
    if role == "dp":
        return Group(size=plan.cp * plan.dp, stride=tp)
    if role == "pp":
        return Group(size=min(2, plan.pp), stride=stage)
    if role == "etp":
        return Group(size=plan.etp)
    if role == "ep":
        return Group(size=plan.ep, stride=plan.etp)
    if role == "expert_dp":
        return Group(size=stage // (plan.ep * plan.etp), stride=plan.ep * plan.etp)
    if role == "hsdp_shard":
        return Group(size=hsdp_shard, stride=tp)
    return Group(size=plan.cp * plan.dp // hsdp_shard, stride=tp * hsdp_shard)


def communicators(
    tp: Degree, pp: Degree, cp: Degree, cp_a2a: Degree, dp: Degree, ep: Degree, expert_dp: Degree, hsdp: bool
) -> Degree:
    """Groups of several ranks that a rank communicates in, each with a communicator and buffers of its own.

    >>> communicators(tp=8, pp=2, cp=1, cp_a2a=0, dp=4, ep=1, expert_dp=32, hsdp=False)
    3
    """
    context: Degree = (cp > 1) * 1 + (cp_a2a > 1) * 1
    dense: Degree = (tp > 1) * 1 + (pp > 1) * 1 + context + (dp * cp > 1) * 1
    experts: Degree = (ep > 1) * 1 + (ep > 1) * (expert_dp > 1)
    return dense + experts + int(hsdp)
