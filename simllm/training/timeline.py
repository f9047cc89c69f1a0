"""When every pipeline rank does what in one step: the schedule's action table run with the times of the estimate."""

from __future__ import annotations

from dataclasses import dataclass

from simllm.errors import InputError
from simllm.parallel.schedules import Action, Pair, StageTimes, stage_of
from simllm.training.estimate import Estimate
from simllm.training.step import StageTime, Step

__all__ = ["Slice", "StepTimeline", "step_timeline"]

#: More actions than this no viewer shows.
_MOST_SLICES = 1_000_000


@dataclass(frozen=True, slots=True)
class Slice:
    """One piece of work of a pipeline rank.

    Attributes
    ----------
    kind : str
        ``F``, ``B``, ``I`` and ``W`` as in the action table, ``FB`` a forward beside a backward, ``data_parallel``,
        ``offload`` and ``optimizer`` after them.
    chunk, micro_batch : int
        Of the action, of a pair those of the forward; -1 after the pipeline.
    start_s, end_s : float
    beside : int
        Micro-batch of the backward of a pair; -1 otherwise.
    """

    kind: str
    chunk: int
    micro_batch: int
    start_s: float
    end_s: float
    beside: int = -1


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """A step laid out in time.

    Attributes
    ----------
    ranks : tuple of tuple of Slice
        Per pipeline rank, in order.
    parts : tuple of dict
        Per pipeline rank: kind (``F``, ``B``) and chunk -> seconds by cause of one action, transfers included.
    pipeline_s, total_s : float
        End of the last action, and of the optimizer.
    """

    ranks: tuple[tuple[Slice, ...], ...]
    parts: tuple[dict[tuple[str, int], dict[str, float]], ...]
    pipeline_s: float
    total_s: float


def step_timeline(answer: Estimate) -> StepTimeline:
    """The timeline of one step.

    Every action lasts as long as the estimate says; transfers between ranks that show belong to the actions. The end is
    that of an estimate with ``simulate=True``, and that of the closed form where all chunks are equal.

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
    run = step.pipeline_run
    line, times, costs = run.timeline(), run.times, step.stage_times(run.stages)
    busiest = step.stage_times(step.stages)[answer.time.busiest_stage]
    inside = ((busiest.forward + busiest.backward) * (plan.num_micro_batches / plan.pipeline.copies)).by_cause()
    after, moment = [], line.total_s
    for cause in ("data_parallel", "gradient_clipping", "offload", "optimizer"):
        seconds = answer.time.by_cause[cause] - inside.get(cause, 0.0)
        if seconds > 1e-12 * line.total_s:
            after.append(Slice(cause, -1, -1, moment, moment + seconds))
            moment += seconds
    ranks, parts = [], []
    for rank, row in enumerate(run.table.rows):
        stages = {c: stage_of(run.table.placement, plan.pp, rank, c) for c in range(run.table.chunks)}
        slices = [_slice(item, line.start_s[rank], stages, times, rank) for item in row]
        slices += after
        ranks.append(tuple(slices))
        parts.append(
            {(k, c): _parts(k, costs[stage], _seconds(k, stage, times)) for k in "FB" for c, stage in stages.items()}
        )
    return StepTimeline(ranks=tuple(ranks), parts=tuple(parts), pipeline_s=line.total_s, total_s=moment)


def _slice(
    item: Action | Pair, starts: dict[Action, float], stages: dict[int, int], times: StageTimes, rank: int
) -> Slice:
    if isinstance(item, Pair):
        ahead, behind = item
        start = starts[behind]
        both = [_seconds("F", stages[ahead.chunk], times), _seconds("B", stages[behind.chunk], times)]
        seconds = sum(both) if times.pair is None else times.pair[rank][ahead.chunk]
        return Slice("FB", ahead.chunk, ahead.micro_batch, start, start + seconds, behind.micro_batch)
    start = starts[item]
    return Slice(item.kind, item.chunk, item.micro_batch, start, start + _seconds(item.kind, stages[item.chunk], times))


def _seconds(kind: str, stage: int, times: StageTimes) -> float:
    """Seconds of one action on a stage."""
    inputs, weights = times.input_gradient[stage], times.weight_gradient[stage]
    return {"F": times.forward[stage], "B": inputs + weights, "I": inputs, "W": weights}[kind]


def _parts(kind: str, cost: StageTime, seconds: float) -> dict[str, float]:
    """Seconds by cause of one action; what is not work of its blocks is the transfers that show."""
    causes = {name: s for name, s in (cost.forward if kind == "F" else cost.backward).by_cause().items() if s > 0}
    transfers = seconds - sum(causes.values())
    return causes | ({"pipeline_p2p": transfers} if transfers > 1e-9 * seconds else {})
