"""What the analytic model says of an execution: the same quantities that the recorder reads off it.

Counts come from the graph and from `simllm.parallel`; what PyTorch does in its own way is a named term, with the
reason, that is added to the count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from simllm.parallel.schedules import Action, held_peak, in_flight_chunks
from simllm.validation.execution.case import Case
from simllm.validation.execution.flops import flops
from simllm.validation.execution.persistent import persistent
from simllm.validation.execution.rank_peak import rank_peak
from simllm.validation.execution.rank_view import RankView, Term
from simllm.validation.execution.saved import saved
from simllm.validation.execution.traffic import Traffic, traffic

__all__ = ["Prediction", "Term", "predict"]


@dataclass(kw_only=True)
class Prediction:
    """Of one rank; every number with its terms included."""

    rank: int
    parameters: int
    flops: int
    traffic: Traffic
    saved: dict[str, int]
    persistent: dict[str, int]
    actions: tuple[Action, ...]
    in_flight: int
    peak_bytes: float = 0.0
    terms: list[Term] = field(default_factory=list)


def predict(case: Case, rank: int, backend: str = "gloo") -> Prediction:
    """The quantities of one rank.

    Parameters
    ----------
    case : Case
    rank : int
        Global rank.
    backend : {"gloo", "nccl", "fake"}
        Of the process group that executed it.
    """
    at = RankView(case, rank, backend)
    kept, states = saved(at), persistent(at)
    return Prediction(
        rank=rank,
        parameters=at.parameters,
        flops=flops(at),
        traffic=traffic(at),
        saved=kept,
        persistent=states,
        peak_bytes=rank_peak(at, kept, states),
        actions=at.actions,
        in_flight=_in_flight(at),
        terms=at.terms,
    )


def _in_flight(at: RankView) -> int:
    """Most micro-batches of a chunk that wait for their backward pass, or for its second half."""
    plan = at.plan
    if plan.pp == 1:
        return 0
    if plan.pipeline.closed_form:
        return in_flight_chunks(plan.schedule, plan.pp, at.m, at.pp_rank, plan.vpp)
    return round(held_peak(at.actions, [1.0] * plan.vpp, [1.0] * plan.vpp)[0])
