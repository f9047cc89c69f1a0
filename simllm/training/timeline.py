"""When every pipeline rank does what in one step: the schedule's action table run with the times of the estimate."""

from __future__ import annotations

from dataclasses import dataclass

from simllm.errors import InputError
from simllm.parallel.schedules import schedule_actions, simulate
from simllm.training.cost import Cost
from simllm.training.estimate import Estimate
from simllm.training.step import Step

__all__ = ["Slice", "StepTimeline", "step_timeline"]

#: More actions than this no viewer shows.
_MOST_SLICES = 1_000_000


@dataclass(frozen=True, slots=True)
class Slice:
    """One piece of work of a pipeline rank.

    Attributes
    ----------
    kind : str
        ``F`` and ``B`` (forward, backward) as in the action table, ``data_parallel`` and ``optimizer`` after them.
    chunk, micro_batch : int
        Of the action; -1 after the pipeline.
    start_s, end_s : float
    """

    kind: str
    chunk: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """A step laid out in time.

    Attributes
    ----------
    ranks : tuple of tuple of Slice
        Per pipeline rank, in order.
    parts : tuple of dict
        Per pipeline rank: ``F`` and ``B`` -> seconds by cause of one action, transfers included.
    pipeline_s, total_s : float
        End of the last action, and of the optimizer.
    """

    ranks: tuple[tuple[Slice, ...], ...]
    parts: tuple[dict[str, dict[str, float]], ...]
    pipeline_s: float
    total_s: float


def step_timeline(answer: Estimate) -> StepTimeline:
    """The timeline of one step.

    Every action lasts as long as the estimate says, the chunks of a rank equally long; transfers between ranks that
    show belong to the actions. The end is that of the estimate where ranks are equal, and not after it elsewhere
    (`simllm.parallel.schedules.pipeline_time` is a bound).

    Parameters
    ----------
    answer : Estimate

    Examples
    --------
    >>> from simllm import Cluster, Model, Plan, Training, estimate
    >>> plan = Plan(pp=2, dp=4, global_batch_size=32)
    >>> answer = estimate(Model.load("llama-2-7b"), Cluster.load("dgx-h100", 8), plan, Training(seq_len=4096))
    >>> line = step_timeline(answer)
    >>> [s.kind for s in line.ranks[0]][:4], line.total_s <= answer.step_time_s * (1 + 1e-12)
    (['F', 'F', 'B', 'F'], True)
    """
    plan = answer.plan
    count = 2 * plan.pp * plan.num_micro_batches * plan.vpp
    if count > _MOST_SLICES:
        raise InputError(
            f"the timeline of pp={plan.pp} and {plan.num_micro_batches} micro-batches has {count:,} actions; at most "
            f"{_MOST_SLICES:,} are drawn, use a smaller global_batch_size"
        )
    step = Step(answer.model, answer.cluster, plan, answer.training)
    times = [step.stage_time(stage) for stage in step.stages]
    parts = tuple(
        {"F": _chunk(time.forward, time.p2p_s, plan.vpp), "B": _chunk(time.backward, time.p2p_s, plan.vpp)}
        for time in times
    )
    seconds = [{kind: sum(causes.values()) for kind, causes in part.items()} for part in parts]
    chunks = plan.pp * plan.vpp
    actions = schedule_actions(plan.schedule, plan.pp, plan.num_micro_batches, plan.vpp)
    line = simulate(
        actions, [seconds[c % plan.pp]["F"] for c in range(chunks)], [seconds[c % plan.pp]["B"] for c in range(chunks)]
    )
    slowest = times[answer.time.busiest_stage]
    inside = (slowest.forward + slowest.backward).data_parallel * plan.num_micro_batches
    exchanged = line.total_s + max(0.0, answer.time.by_cause["data_parallel"] - inside)
    total = exchanged + answer.time.by_cause["optimizer"]
    ranks = []
    for rank, row in enumerate(actions):
        starts = line.start_s[rank]
        slices = [Slice(a.kind, a.chunk, a.micro_batch, starts[a], starts[a] + seconds[rank][a.kind]) for a in row]
        if exchanged > line.total_s:
            slices.append(Slice("data_parallel", -1, -1, line.total_s, exchanged))
        slices.append(Slice("optimizer", -1, -1, exchanged, total))
        ranks.append(tuple(slices))
    return StepTimeline(ranks=tuple(ranks), parts=parts, pipeline_s=line.total_s, total_s=total)


def _chunk(cost: Cost, p2p_s: float, vpp: int) -> dict[str, float]:
    """Seconds by cause of one chunk; half of a micro-batch's transfers show forward, half backward."""
    causes = {name: seconds / vpp for name, seconds in cost.by_cause().items() if seconds > 0}
    return causes | ({"pipeline_p2p": p2p_s / 2 / vpp} if p2p_s else {})
