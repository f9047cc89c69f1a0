"""What a rank holds from step to step, by kind."""

from __future__ import annotations

from simllm.parallel.memory import state_memory
from simllm.validation.execution.rank_view import RankView
from simllm.validation.execution.weights import whole_parameter_shares

__all__ = ["persistent"]


def persistent(at: RankView) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer states of a rank."""
    plan, states = at.plan, at.case.states
    memory = state_memory(at.stage, plan, at.layout, states, "adam", at.case.hsdp_shard)
    kept = {kind: memory[kind] for kind in ("parameters", "gradients", "optimizer")}
    padded = sum(p.shard(at.shard_ranks(u)) for u in at.units for p in u.parameters)
    own = at.parameters
    if plan.zero == "2" and plan.dp > 1:
        whole = sum(p.elements for u in at.units for p in u.parameters)
        kept["parameters"] += at.term(
            "memory: parameters",
            -(whole - whole / plan.dp) * states.parameter,
            "FSDP2 frees gathered parameters after the backward pass: between steps they are sharded as in stage 3",
        )
    if at.case.fully_sharded:
        for kind, bytes_each in (("parameters", states.parameter), ("gradients", states.gradient)):
            kept[kind] += at.term(
                f"memory: {kind}",
                padded * bytes_each - kept[kind],
                "FSDP2 pads the rows of a parameter to a multiple of the ranks",
            )
        kept["optimizer"] += at.term(
            "memory: optimizer",
            own * 8 - kept["optimizer"],
            "the rows of a parameter do not divide: this rank's share of the moments is not the mean",
        )
    if plan.zero == "1" and plan.dp > 1:
        sizes = [p.elements for u in at.units for p in u.parameters]
        share = whole_parameter_shares(sizes, plan.dp)[at.groups.dp.index(at.rank)]
        kept["optimizer"] += at.term(
            "memory: optimizer",
            share * 8 - kept["optimizer"],
            "ZeroRedundancyOptimizer deals out whole parameters, the largest first",
        )
    return {kind: round(size) for kind, size in kept.items()}
