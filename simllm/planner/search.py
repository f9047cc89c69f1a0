"""The search: every plan of the space is priced, the best ones that fit are kept, and the others told why they lose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from simllm.errors import InputError, unknown_name
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.parallel.plan import Plan
from simllm.planner.candidate import Candidate
from simllm.planner.compare import Comparison
from simllm.planner.constraints import Constraints
from simllm.planner.reasons import explain_difference, limits
from simllm.planner.sizes import at_most
from simllm.training import Estimate, Training, estimate
from simllm.training.run import check_experts

__all__ = ["OBJECTIVES", "PlanSearch", "plan"]

Objective = Literal["time", "cost", "gpus"]
OBJECTIVES = ("time", "cost", "gpus")

#: Plans re-evaluated one by one for every plan that is shown.
_RECHECKED = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanSearch:
    """What a search found.

    Attributes
    ----------
    plans : tuple of Estimate
        The best plans, best first.
    searched, feasible : int
        Combinations looked at, and those that fit and keep all limits.
    rejected : dict of str to int
        Reason -> combinations; with ``feasible`` it adds up to ``searched``.
    fixes : dict of str to dict
        For plans that do not fit: reason -> nearest change that makes them fit -> plans.
    front : tuple of Candidate
        Plans that no other one beats in time, GPUs, cost and free memory at once.
    comparisons : tuple of Comparison
        The plans that were to be compared.
    changes : tuple of (str, Estimate)
        When nothing is feasible: changes of the question that make it so, with the best plan then.
    seconds : float
        Time the search took.
    priced : int
        Plans whose memory and time were computed.
    nearest : Estimate or None
        When nothing is feasible: the plan that needs least memory, or the fastest one where some fit.
    """

    plans: tuple[Estimate, ...]
    searched: int
    feasible: int
    rejected: dict[str, int]
    fixes: dict[str, dict[str, int]]
    front: tuple[Candidate, ...]
    comparisons: tuple[Comparison, ...]
    changes: tuple[tuple[str, Estimate], ...]
    seconds: float
    priced: int
    nearest: Estimate | None

    @property
    def evaluations_per_s(self) -> float:
        """Plans priced per second."""
        return self.priced / self.seconds if self.seconds > 0 else 0.0

    @cached_property
    def why(self) -> tuple[str, ...]:
        """For every plan but the best: where it loses."""
        return tuple(explain_difference(self.plans[0], other) for other in self.plans[1:])

    @cached_property
    def limits(self) -> str:
        """What limits the best plan."""
        return limits(self.plans[0]) if self.plans else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        plans = [answer.to_dict() for answer in self.plans]
        for entry, reason in zip(plans[1:], self.why, strict=True):
            entry["why_not_first"] = reason
        return {
            "plans": plans,
            "limits": self.limits,
            "searched": self.searched,
            "feasible": self.feasible,
            "rejected": dict(self.rejected),
            "fixes": {reason: dict(changes) for reason, changes in self.fixes.items()},
            "pareto": [candidate.to_dict() for candidate in self.front],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "evaluations": self.priced,
            "evaluations_per_s": self.evaluations_per_s,
            "nearest": self.nearest.to_dict() if self.nearest else None,
            "changes": [{"change": text, "estimate": answer.to_dict()} for text, answer in self.changes],
        }


def plan(
    model: Model,
    cluster: Cluster,
    training: Training,
    *,
    global_batch_size: int,
    precision: str | None = None,
    objective: str = "time",
    top: int = 5,
    constraints: Constraints | None = None,
    sizes: Sequence[Cluster] | None = None,
    tokens: int | None = None,
    usd_per_gpu_hour: float | None = None,
    compare: Sequence[Plan] = (),
    simulate: bool = True,
    progress: Callable[[int], None] | None = None,
) -> PlanSearch:
    """The best plans for a model on a cluster.

    Parameters
    ----------
    model : Model
    cluster : Cluster
        With ``objective`` time all of its GPUs are used; with cost or gpus at most that many.
    training : Training
    global_batch_size : int
        Sequences per optimizer step.
    precision : str, optional
        Of the matrix products; short for the constraint.
    objective : {"time", "cost", "gpus"}
        ``time``: the shortest step. ``cost``: the least GPU time per step. ``gpus``: the fewest GPUs that fit, then
        time.
    top : int
        How many plans to return.
    constraints : Constraints, optional
        Fixed degrees, allowed schedules, limits on days and USD.
    sizes : sequence of Cluster, optional
        The numbers of GPUs to choose from (`simllm.planner.sizes`), instead of those that the objective asks for.
    tokens : int, optional
        Tokens of the run; limits on days and USD need them.
    usd_per_gpu_hour : float, optional
        Price of one device; that of its profile when omitted.
    compare : sequence of Plan
        Plans to be ranked among the others; they use the cluster's GPUs.
    simulate : bool
        Run the pipelines of the best plans and of those compared event by event before they are returned; the search
        itself uses the closed forms of the schedules.
    progress : callable, optional
        Called now and then with the number of plans priced so far.

    Returns
    -------
    PlanSearch

    Raises
    ------
    InputError
        An unknown objective or precision, constraints that contradict each other, limits without what they need.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    for name, value in (("global_batch_size", global_batch_size), ("top", top)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value} must be a whole number above zero")
    check_experts(model, training)
    wanted = constraints or Constraints()
    if precision is not None:
        wanted = replace(wanted, precision=(precision,))
    started = time.perf_counter()
    clusters = list(sizes) if sizes is not None else [cluster] if objective == "time" else at_most(cluster)
    from simllm.planner.gather import Gathering, Question  # numpy, which an estimate does not need

    question = Question(
        model=model,
        training=training,
        global_batch_size=global_batch_size,
        constraints=wanted,
        tokens=tokens,
        usd_per_gpu_hour=usd_per_gpu_hour,
    )
    answers = [estimate(model, cluster, given, training) for given in compare]
    found = Gathering(question, objective, top * _RECHECKED, answers, progress)
    for size in clusters:
        found.add(size, clusters)
        if objective == "gpus" and found.feasible:
            break
    if not found.priced:
        found.refuse()
    checked = [estimate(model, c.cluster, c.plan, training, simulate=simulate) for c in found.best]
    best = tuple(sorted(checked, key=_order(objective))[:top])
    exact = [estimate(model, cluster, given, training, simulate=simulate) for given in compare]
    nearest = found.nearest
    return PlanSearch(
        plans=best,
        searched=found.feasible + sum(found.rejected.values()),
        feasible=found.feasible,
        rejected=dict(found.rejected.most_common()),
        fixes=found.fixes,
        front=tuple(found.front),
        comparisons=found.comparisons(best[0] if best else None, exact),
        changes=() if best else found.changes(cluster, clusters),
        seconds=time.perf_counter() - started,
        priced=found.priced,
        nearest=estimate(model, nearest.cluster, nearest.plan, training) if nearest and not best else None,
    )


def _order(objective: str) -> Callable[[Estimate], tuple[float, ...]]:
    orders: dict[str, Callable[[Estimate], tuple[float, ...]]] = {
        "time": lambda a: (a.step_time_s, a.peak_memory_bytes),
        "cost": lambda a: (a.step_time_s * a.plan.num_gpus, a.step_time_s, a.peak_memory_bytes),
        "gpus": lambda a: (a.plan.num_gpus, a.step_time_s, a.peak_memory_bytes),
    }
    return orders[objective]
