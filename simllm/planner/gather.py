"""From surveys of several numbers of GPUs to one answer: the best plans, the Pareto front, ranks, what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NoReturn

import numpy as np

from simllm.errors import InputError, UnsupportedError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.parallel.offload import Offload
from simllm.planner.candidate import Candidate
from simllm.planner.compare import Comparison
from simllm.planner.constraints import Constraints
from simllm.planner.fixes import fix_of, nearest_fixes
from simllm.planner.prices import Prices
from simllm.planner.simulated import open_schedules, stand_in, with_schedule
from simllm.planner.space import Cells, Space
from simllm.planner.survey import TOO_SLOW, Survey, survey
from simllm.training import Estimate, Training, estimate
from simllm.training.step import engine_for

__all__ = ["Gathering", "Question"]

#: Plans that differ by less than rounding are as fast as each other.
_SAME = 1e-12
#: Plans that are run event by event for a schedule without a closed form.
_SIMULATED = 48
#: What is tried to leave the devices for a model that does not fit, the least first.
_OFFLOADS = ("optimizer", "optimizer,gradients", "optimizer,gradients,parameters", "optimizer,gradients,activations")
#: How many doublings of the GPUs are tried for a model that does not fit.
_DOUBLINGS = 6


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every number of GPUs."""

    model: Model
    training: Training
    global_batch_size: int
    constraints: Constraints
    tokens: int | None
    usd_per_gpu_hour: float | None

    def price(self, cluster: Cluster) -> float | None:
        """USD of one device for an hour."""
        return self.usd_per_gpu_hour or cluster.accelerator.price_usd_per_hour

    def slowest_step_s(self, cluster: Cluster) -> float:
        """The longest step that keeps the limits on days and USD."""
        wanted, limit = self.constraints, float("inf")
        if wanted.max_days is None and wanted.max_usd is None:
            return limit
        if self.tokens is None:
            raise InputError("a limit on days or USD needs the tokens of the run; give --tokens")
        steps = self.tokens / (self.global_batch_size * self.training.seq_len)
        if wanted.max_days is not None:
            limit = wanted.max_days * 86400 / steps
        if wanted.max_usd is not None:
            price = self.price(cluster)
            if price is None:
                raise InputError(
                    f"no price is known for {cluster.accelerator.name}; give --price with the limit on USD"
                )
            limit = min(limit, wanted.max_usd / (price / 3600 * cluster.num_gpus) / steps)
        return limit

    def survey(
        self, cluster: Cluster, clusters: Sequence[Cluster], progress: Callable[[int], None] | None = None
    ) -> Survey:
        """All plans of one number of GPUs."""
        precisions = self.constraints.precision
        engines = {name: engine_for(cluster, self.training.software, name) for name in precisions}
        unfused = any(engine.impl.attention == "unfused" for engine in engines.values())
        space = Space(self.model, cluster, self.training, self.global_batch_size, self.constraints, unfused)
        # Inside a stage the number of nodes makes no difference: all sizes share the prices of the largest.
        like = [
            c for c in clusters if (c.gpus_per_domain, c.torus_shape) == (cluster.gpus_per_domain, cluster.torus_shape)
        ]
        largest = max([cluster, *like], key=lambda c: c.num_gpus)

        def prices(cells: Cells) -> dict[str, Prices]:
            return {name: Prices(self.model, largest, self.training, cells, name) for name in precisions}

        usable = cluster.accelerator.memory_bytes * (1 - self.training.memory_headroom)
        return survey(space, prices, usable, self.slowest_step_s(cluster), progress)


class Gathering:
    """The state of one search.

    Parameters
    ----------
    question : Question
    objective : str
    keep : int
        Best plans to keep.
    compared : list of Estimate
        Plans to be ranked.
    progress : callable, optional
    """

    def __init__(
        self,
        question: Question,
        objective: str,
        keep: int,
        compared: list[Estimate],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.question, self.objective, self.keep, self.compared = question, objective, keep, compared
        self.progress = progress
        self.priced = self.feasible = 0
        self.best: list[Candidate] = []
        self.front: list[Candidate] = []
        self.rejected: Counter[str] = Counter()
        self.excluded: Counter[str] = Counter()
        self.fixes: dict[str, dict[str, int]] = {}
        self.nearest: Candidate | None = None
        self._distance = (2.0, 0.0)
        self._fixes = [None if answer.fits else fix_of(answer) for answer in compared]
        self._better: dict[int, int] = {}

    def add(self, cluster: Cluster, clusters: Sequence[Cluster]) -> None:
        """Search one number of GPUs."""
        before = self.priced
        tick = self.progress

        def progress(done: int) -> None:
            if tick is not None:
                tick(before + done)

        found = self.question.survey(cluster, clusters, progress)
        self.priced += len(found)
        self.feasible += len(found.feasible)
        self.rejected.update(found.counts())
        self.excluded.update(found.excluded)
        for reason, changes in nearest_fixes(found).items():
            merged = Counter(self.fixes.get(reason, {})) + Counter(changes)
            self.fixes[reason] = dict(merged.most_common())
        some = [self._candidate(found, int(number)) for number in found.feasible[: self.keep]]
        for schedule in open_schedules(self.question.constraints):
            some += self._simulated(cluster, clusters, schedule)
        self.best = sorted([*self.best, *some], key=self._key)[: self.keep]
        self._extend_front(found)
        for answer in (*self.compared, *(fix[1] for fix in self._fixes if fix)):
            self._better[id(answer)] = self._better.get(id(answer), 0) + self._faster(found, answer)
        if not self.feasible and len(found):
            able = np.flatnonzero(found.fits)
            number = able[np.argmin(found.time_s[able])] if len(able) else np.argmin(found.peak_bytes)
            self._remember(self._candidate(found, int(number)), bool(len(able)))

    def _candidate(self, found: Survey, number: int) -> Candidate:
        return Candidate(
            cluster=found.cluster,
            plan=found.plan(number),
            step_time_s=float(found.time_s[number]),
            peak_bytes=float(found.peak_bytes[number]),
            usd_per_gpu_hour=self.question.price(found.cluster),
        )

    def _simulated(self, cluster: Cluster, clusters: Sequence[Cluster], schedule: str) -> list[Candidate]:
        """The best plans of the nearest schedule with a closed form, run event by event in this one."""
        question = self.question
        near = replace(question, constraints=stand_in(question.constraints, schedule)).survey(cluster, clusters)
        plans = with_schedule((near.plan(int(number)) for number in near.feasible), schedule)
        slowest, found = question.slowest_step_s(cluster), []
        for plan in islice(plans, _SIMULATED):
            answer = estimate(question.model, cluster, plan, question.training)
            self.priced += 1
            if not answer.fits:
                self.rejected[f"out of memory when simulated with {schedule}"] += 1
            elif answer.step_time_s > slowest:
                self.rejected[TOO_SLOW] += 1
            else:
                self.feasible += 1
                seconds, peak = answer.step_time_s, answer.peak_memory_bytes
                found.append(
                    Candidate(
                        cluster=cluster,
                        plan=plan,
                        step_time_s=seconds,
                        peak_bytes=peak,
                        usd_per_gpu_hour=question.price(cluster),
                    )
                )
        return found

    def _key(self, candidate: Candidate) -> tuple[float, ...]:
        seconds = candidate.step_time_s
        if self.objective == "cost":
            return candidate.gpu_seconds, seconds, candidate.peak_bytes
        return (candidate.plan.num_gpus if self.objective == "gpus" else 0), seconds, candidate.peak_bytes

    def _faster(self, found: Survey, answer: Estimate) -> int:
        """Plans of a survey that come before a given one."""
        seconds, gpus, own = found.time_s[found.feasible], found.cluster.num_gpus, answer.plan.num_gpus
        if self.objective == "gpus" and gpus != own:
            return len(seconds) if gpus < own else 0
        factor = gpus / own if self.objective == "cost" else 1.0
        return int((seconds * factor < answer.step_time_s * (1 - _SAME)).sum())

    def _extend_front(self, found: Survey) -> None:
        """Numbers of GPUs come smallest first: a plan with more of them has to be faster or to leave more memory."""
        old = [(c.step_time_s, c.peak_bytes) for c in self.front]
        for number in found.front.tolist():
            seconds, peak = float(found.time_s[number]), float(found.peak_bytes[number])
            if not any(t <= seconds and p <= peak for t, p in old):
                self.front.append(self._candidate(found, number))

    def _remember(self, candidate: Candidate, fits: bool) -> None:
        """What comes nearest to an answer: the fastest plan that fits, or else the one that needs least memory."""
        distance = (0.0, candidate.step_time_s) if fits else (1.0, candidate.peak_bytes)
        if self.nearest is None or distance < self._distance:
            self.nearest, self._distance = candidate, distance

    def comparisons(self, best: Estimate | None, exact: list[Estimate]) -> tuple[Comparison, ...]:
        """How the given plans rank; ``exact`` are their estimates as they are shown."""
        return tuple(
            Comparison(
                answer=shown,
                best=best,
                rank=self._better[id(answer)] + 1,
                feasible=self.feasible,
                fix=fix[0] if fix else None,
                fixed=fix[1] if fix else None,
                fixed_rank=self._better[id(fix[1])] + 1 if fix else None,
            )
            for answer, shown, fix in zip(self.compared, exact, self._fixes, strict=True)
        )

    # -- when there is no answer ---------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Say which constraints contradict each other, where it is them that leave no plan at all."""
        given = self.question.constraints.given()
        restricting = {name: words for name, words in given.items() if name not in ("max_days", "max_usd", "precision")}
        if restricting:
            self._contradiction(restricting)

    def _contradiction(self, given: dict[str, str]) -> NoReturn:
        asked = ", ".join(f"{name}={words}" for name, words in given.items())
        reasons = [reason for reason, _ in (self.excluded or self.rejected).most_common(2)]
        raise InputError(
            f"no plan has {asked}: {'; '.join(reasons) or 'the degrees leave no combination'}; "
            f"change {' or '.join(given)}"
        )

    def changes(self, cluster: Cluster, clusters: Sequence[Cluster]) -> tuple[tuple[str, Estimate], ...]:
        """Changes of the question after which there is a feasible plan: constraints given up, more GPUs."""
        found = []
        largest = max(clusters, key=lambda c: c.num_gpus)
        for name, words in self.question.constraints.given().items():
            if name in ("precision", "offload"):
                continue
            freed = replace(self.question, constraints=self.question.constraints.without(name))
            answer = _best_of(freed, largest)
            if answer is not None:
                found.append((f"without {name}={words}", answer))
        if largest.host is not None and not any(o.anything for o in self.question.constraints.offload):
            for words in _OFFLOADS:
                wanted = replace(self.question.constraints, offload=(Offload.parse(words),))
                try:
                    answer = _best_of(replace(self.question, constraints=wanted), largest)
                except UnsupportedError:  # the optimizer of a fine-tuning method that stays on the device
                    continue
                if answer is not None:
                    found.append((f"with offload={words}", answer))
                    break
        for doubling in range(1, _DOUBLINGS + 1):
            try:
                larger = largest.resized(largest.num_gpus * 2**doubling)
            except InputError:
                break
            answer = _best_of(self.question, larger)
            if answer is not None:
                found.append((f"with {larger.num_gpus} GPUs", answer))
                break
        return tuple(found)


def _best_of(question: Question, cluster: Cluster) -> Estimate | None:
    found = question.survey(cluster, [cluster])
    if not len(found.feasible):
        return None
    return estimate(question.model, cluster, found.plan(int(found.feasible[0])), question.training)
