"""The search: price every plan of the space that fits, keep the best, and say why the others lose."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from simllm.errors import InputError, unknown_name
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.parallel.plan import PRECISIONS, Plan
from simllm.planner.reasons import explain_difference, limits
from simllm.planner.space import Branch, Space, divisors
from simllm.training import Estimate, Training, estimate
from simllm.training.step import Step

__all__ = ["OBJECTIVES", "Candidate", "PlanSearch", "plan"]

Objective = Literal["time", "cost", "gpus"]
OBJECTIVES = ("time", "cost", "gpus")

_TOO_LARGE = "out of memory: the model and optimizer states alone"
_NO_ROOM = "out of memory: activations, even when everything is recomputed"
_RECOMPUTES = "recomputes although it fits without"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan that fits, with what it is ranked by."""

    cluster: Cluster
    plan: Plan
    step_time_s: float

    @property
    def gpu_seconds(self) -> float:
        """GPU time of a step."""
        return self.step_time_s * self.plan.num_gpus


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanSearch:
    """What a search found.

    Attributes
    ----------
    plans : tuple of Estimate
        The best plans, best first.
    searched, feasible : int
        Combinations looked at, and those that fit.
    rejected : dict of str to int
        Reason -> combinations; with ``feasible`` it adds up to ``searched``. A combination of degrees that is
        impossible counts once, whatever else could have varied.
    seconds : float
        Time the search took.
    priced : int
        Plans whose memory or time was computed.
    nearest : Estimate or None
        When nothing fits: the plan that needs least memory.
    """

    plans: tuple[Estimate, ...]
    searched: int
    feasible: int
    rejected: dict[str, int]
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
            "evaluations_per_s": self.evaluations_per_s,
            "nearest": self.nearest.to_dict() if self.nearest else None,
        }


def plan(
    model: Model,
    cluster: Cluster,
    training: Training,
    *,
    global_batch_size: int,
    precision: str = "bf16",
    objective: str = "time",
    top: int = 5,
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
    precision : str
        Of the matrix products.
    objective : {"time", "cost", "gpus"}
        ``time``: the shortest step. ``cost``: the least GPU time per step. ``gpus``: the fewest GPUs that fit, then
        time.
    top : int
        How many plans to return.
    progress : callable, optional
        Called now and then with the number of plans priced so far.

    Returns
    -------
    PlanSearch

    Raises
    ------
    InputError
        An unknown objective or precision, or a batch that no plan can use.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    for name, value in (("global_batch_size", global_batch_size), ("top", top)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value} must be a whole number above zero")
    started = time.perf_counter()
    search = _Search(model, training, global_batch_size, precision, progress)
    for size in _cluster_sizes(cluster, objective):
        search.run(size)
        if objective == "gpus" and search.found:
            break
    order: dict[str, Callable[[Candidate], tuple[float, ...]]] = {
        "time": lambda c: (c.step_time_s,),
        "cost": lambda c: (c.gpu_seconds, c.step_time_s),
        "gpus": lambda c: (c.plan.num_gpus, c.step_time_s),
    }
    best = sorted(search.found, key=order[objective])[:top]
    nearest = search.nearest
    return PlanSearch(
        plans=tuple(estimate(model, c.cluster, c.plan, training) for c in best),
        searched=len(search.found) + sum(search.rejected.values()),
        feasible=len(search.found),
        rejected=dict(search.rejected.most_common()),
        seconds=time.perf_counter() - started,
        priced=search.priced,
        nearest=estimate(model, nearest[1], nearest[2], training) if nearest and not best else None,
    )


def _cluster_sizes(cluster: Cluster, objective: str) -> list[Cluster]:
    """The clusters to try: for the cheapest or smallest answer also fewer nodes, smallest first."""
    if objective == "time":
        return [cluster]
    if cluster.num_gpus <= cluster.gpus_per_node:
        sizes = divisors(cluster.num_gpus)
    else:
        sizes = divisors(cluster.gpus_per_node) + [n * cluster.gpus_per_node for n in divisors(cluster.num_nodes)[1:]]
    found = []
    for size in sizes:
        try:
            found.append(cluster.resized(size))
        except InputError:  # a torus has no slice of that many chips
            continue
    return found


class _Search:
    """State of one search."""

    def __init__(
        self,
        model: Model,
        training: Training,
        global_batch_size: int,
        precision: str,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.model, self.training = model, training
        self.global_batch_size, self.precision = global_batch_size, precision
        self.progress = progress
        self.found: list[Candidate] = []
        self.rejected: Counter[str] = Counter()
        self.priced = 0
        self.nearest: tuple[float, Cluster, Plan] | None = None

    def run(self, cluster: Cluster) -> None:
        """Search one cluster size."""
        space = Space(self.model, cluster, self.training, self.global_batch_size, self.precision)
        usable = cluster.accelerator.memory_bytes * (1 - self.training.memory_headroom)
        for number, branch in enumerate(space.branches()):
            self._branch(space, branch, usable)
            if self.progress is not None and number % 64 == 0:
                self.progress(self.priced)
        self.rejected.update(space.rejected)

    def _remember(self, cluster: Cluster, candidate: Plan) -> None:
        """Keep the plan that comes nearest to fitting: what a person would start from."""
        if self.found:
            return
        step = Step(self.model, cluster, candidate, self.training)
        peak = max(stage.peak_bytes for stage in step.memory())
        if self.nearest is None or peak < self.nearest[0]:
            self.nearest = (peak, cluster, candidate)

    def _branch(self, space: Space, branch: Branch, usable: float) -> None:
        policies = None
        for zero in space.sharding(branch):
            first = space.plan(branch, zero, space.no_recompute)
            step = Step(self.model, space.cluster, first, self.training)
            if policies is None:
                policies = space.recomputation(step.engine.impl.attention == "unfused")
            for index, policy in enumerate(policies):
                if index:
                    step = Step(self.model, space.cluster, replace(first, recompute=policy), self.training)
                overflow = step.first_overflow(usable)
                self.priced += 1
                if overflow is None:
                    if index + 1 < len(policies):
                        self.rejected[_RECOMPUTES] += len(policies) - index - 1
                    self.found.append(Candidate(cluster=space.cluster, plan=step.plan, step_time_s=step.time().total_s))
                    break
                states = overflow.state_bytes > usable
                if states or index == len(policies) - 1:
                    self.rejected[_TOO_LARGE if states else _NO_ROOM] += len(policies) - index
                    self._remember(space.cluster, replace(first, recompute=policies[-1]))
                    break
                self.rejected[f"out of memory with recompute={policy}"] += 1
