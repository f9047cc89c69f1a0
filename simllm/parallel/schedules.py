"""Pipeline schedules: the order of work on every rank, its exact simulation, and the closed forms.

A schedule is a table of actions per pipeline rank. `simulate` runs a table to the exact end of its last action;
`pipeline_time` is the closed form that the engine uses: equal to the simulation where stages are equal, above it
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from simllm.elementwise import Real
from simllm.errors import InputError, unknown_name

__all__ = [
    "Action",
    "Timeline",
    "in_flight_chunks",
    "pipeline_bubble",
    "pipeline_time",
    "schedule_actions",
    "simulate",
]


class Action(NamedTuple):
    """One unit of work of a pipeline rank: forward (F) or backward (B) of a model chunk for one micro-batch."""

    kind: str
    chunk: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When every action ran.

    Attributes
    ----------
    total_s : float
        End of the last action.
    busy_s : tuple of float
        Working time per rank; the rest is bubble.
    start_s : tuple of dict
        Per rank, the start of each action.
    """

    total_s: float
    busy_s: tuple[float, ...]
    start_s: tuple[dict[Action, float], ...]


def schedule_actions(schedule: str, pp: int, num_micro_batches: int, vpp: int = 1) -> tuple[tuple[Action, ...], ...]:
    """The action table of a schedule.

    Parameters
    ----------
    schedule : {"gpipe", "1f1b", "interleaved"}
        GPipe (arXiv:1811.06965): all forwards, then all backwards. 1F1B (PipeDream-flush, arXiv:2006.09503): warm-up,
        then one forward, one backward. Interleaved 1F1B (arXiv:2104.04473, section 2.2) over ``vpp`` chunks a rank.
    pp, num_micro_batches, vpp : int

    Returns
    -------
    tuple of tuple of Action
        One row per rank.

    Examples
    --------
    >>> [f"{a.kind}{a.micro_batch}" for a in schedule_actions("1f1b", 2, 3)[0]]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    m = num_micro_batches
    if schedule == "gpipe":
        row = [Action("F", 0, i) for i in range(m)] + [Action("B", 0, i) for i in range(m)]
        return (tuple(row),) * pp
    if schedule == "1f1b":
        return tuple(_one_forward_one_backward(min(m, pp - rank - 1), [(0, i) for i in range(m)]) for rank in range(pp))
    if schedule == "interleaved":
        if m % pp:
            raise InputError(f"the interleaved schedule needs pp={pp} to divide the {m} micro-batches")
        # Micro-batches go round the chunks in groups of pp.
        order = [(chunk, group + i) for group in range(0, m, pp) for chunk in range(vpp) for i in range(pp)]
        rows = []
        for rank in range(pp):
            warm_up = min(m * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp)
            if m == pp:
                warm_up = m * vpp  # Megatron-LM runs all forwards first when there is one group only
            rows.append(_one_forward_one_backward(warm_up, order, vpp))
        return tuple(rows)
    raise unknown_name("schedule", schedule, ["gpipe", "1f1b", "interleaved"])


def _one_forward_one_backward(warm_up: int, order: list[tuple[int, int]], vpp: int = 1) -> tuple[Action, ...]:
    forwards = [Action("F", chunk, i) for chunk, i in order]
    backwards = [Action("B", vpp - 1 - chunk, i) for chunk, i in order]
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += [forward, backward]
    return tuple(row + backwards[len(forwards) - warm_up :])


def simulate(
    actions: Sequence[Sequence[Action]], forward_s: Sequence[float], backward_s: Sequence[float], p2p_s: float = 0.0
) -> Timeline:
    """Run an action table event by event.

    Parameters
    ----------
    actions : one row of actions per pipeline rank
    forward_s, backward_s : sequence of float
        Seconds of each model chunk in model order: chunk ``c`` of rank ``r`` has index ``c * pp + r``.
    p2p_s : float
        Time between the end of a chunk on one rank and the start of the next chunk on another.

    Returns
    -------
    Timeline
    """
    pp = len(actions)
    chunks = len(forward_s)
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * pp
    busy = [0.0] * pp
    position = [0] * pp
    starts: list[dict[Action, float]] = [{} for _ in range(pp)]
    remaining = sum(len(row) for row in actions)
    while remaining:
        progressed = False
        for rank in range(pp):
            while position[rank] < len(actions[rank]):
                action = actions[rank][position[rank]]
                stage = action.chunk * pp + rank
                ready = _ready(action, stage, chunks, done, p2p_s if pp > 1 else 0.0)
                if ready is None:
                    break
                duration = (forward_s if action.kind == "F" else backward_s)[stage]
                start = max(clock[rank], ready)
                starts[rank][action] = start
                clock[rank] = done[action.kind, stage, action.micro_batch] = start + duration
                busy[rank] += duration
                position[rank] += 1
                remaining -= 1
                progressed = True
        if not progressed:
            stuck = [str(row[at]) for row, at in zip(actions, position, strict=True) if at < len(row)]
            raise InputError(f"the schedule deadlocks: {', '.join(stuck)} wait for each other")
    return Timeline(total_s=max(clock), busy_s=tuple(busy), start_s=tuple(starts))


def _ready(
    action: Action, stage: int, chunks: int, done: dict[tuple[str, int, int], float], p2p_s: float
) -> float | None:
    """When the inputs of an action are there; None: not yet known."""
    i = action.micro_batch
    if action.kind == "F":
        if stage == 0:
            return 0.0
        before = done.get(("F", stage - 1, i))
        return None if before is None else before + p2p_s
    own = done.get(("F", stage, i))
    if stage == chunks - 1 or own is None:
        return own
    after = done.get(("B", stage + 1, i))
    return None if after is None else max(own, after + p2p_s)


def pipeline_time(stage_s: Sequence[float], num_micro_batches: int, vpp: int = 1) -> float:
    """Closed form of 1F1B, GPipe and the interleaved schedule.

    The slowest rank works without a gap; filling and draining the pipeline takes one micro-batch through all other
    ranks, or 1/vpp of that when every rank holds vpp chunks (arXiv:2104.04473, section 2.2.2:
    bubble / ideal = (p - 1) / (v m)). Exact for GPipe and wherever stages are equal. With uneven stages it is an upper
    bound of 1F1B and of the interleaved schedule: a slow rank starts working off its micro-batches during the warm-up.

    Parameters
    ----------
    stage_s : sequence of float
        Forward plus backward seconds of one micro-batch on each rank, all of its chunks together.
    num_micro_batches, vpp : int

    Examples
    --------
    >>> pipeline_time([3.0] * 4, 8), pipeline_time([3.0] * 4, 8, vpp=2)
    (33.0, 28.5)
    """
    slowest = max(stage_s)
    return num_micro_batches * slowest + pipeline_bubble(slowest, sum(stage_s), vpp)


def pipeline_bubble(slowest_s: Real, all_s: Real, vpp: int = 1) -> Real:
    """Seconds that the slowest rank waits while the pipeline fills and drains (see `pipeline_time`).

    Parameters
    ----------
    slowest_s, all_s : float or array
        One micro-batch on the slowest rank, and on all ranks one after the other.
    vpp : int
    """
    return (all_s - slowest_s) / vpp


def in_flight_chunks(schedule: str, pp: int, num_micro_batches: int, rank: int, vpp: int = 1) -> int:
    """Most (chunk, micro-batch) pairs whose activations a rank holds at once.

    GPipe: all micro-batches. 1F1B: ``pp - rank``. Interleaved: its warm-up and one more.

    >>> [in_flight_chunks("1f1b", 4, 8, rank) for rank in range(4)]
    [4, 3, 2, 1]
    >>> [in_flight_chunks("interleaved", 4, 8, rank, 2) for rank in range(4)]
    [11, 9, 7, 5]
    """
    m = num_micro_batches
    if schedule == "gpipe":
        return m
    if schedule == "1f1b":
        return min(m, pp - rank)
    if schedule == "interleaved":
        return m * vpp if m == pp else min(m * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp + 1)
    raise unknown_name("schedule", schedule, ["gpipe", "1f1b", "interleaved"])
