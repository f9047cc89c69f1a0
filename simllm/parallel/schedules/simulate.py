"""Exact event simulation of action tables, and what ranks hold while they run.

A table fixes the order of work, so an order in which every action comes after what it needs is found once per table;
a simulation is then one pass over it with the times of the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from simllm.errors import InputError
from simllm.parallel.schedules.actions import Action, Pair, Table, stage_of

__all__ = ["StageTimes", "Timeline", "held_peak", "simulate", "simulated_time"]

_KINDS = "FBIW"


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds of one micro-batch on every stage of the model, in model order.

    Attributes
    ----------
    forward, input_gradient, weight_gradient : sequence of float
        A whole backward takes the sum of the last two.
    pair : sequence of (float, float), optional
        By rank: forward of chunk 0 (of chunk 1) beside the backward of the other chunk. One after the other when
        omitted.
    lag : float
        Between the end of an action on one rank and the start, on another, of one that needs it: the part of a
        transfer that occupies neither.
    """

    forward: Sequence[float]
    input_gradient: Sequence[float]
    weight_gradient: Sequence[float]
    pair: Sequence[tuple[float, float]] | None = None
    lag: float = 0.0


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
        Per rank, the start of each action, in order.
    end_s : tuple of float
        Per rank, the end of its last action.
    """

    total_s: float
    busy_s: tuple[float, ...]
    start_s: tuple[dict[Action, float], ...]
    end_s: tuple[float, ...]

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Idle time per rank."""
        return tuple(self.total_s - busy for busy in self.busy_s)


@dataclass(frozen=True, slots=True)
class _Program:
    """A table in an order that can be run: of each action its rank, its price and what it waits for.

    ``previous`` is the action before on the rank, ``needed`` that on another rank whose result it needs; 0 is a
    moment before everything. ``remote`` is 1 where that result has to travel. ``first`` and ``last``: by rank.
    """

    previous: list[int]
    needed: list[int]
    remote: list[int]
    price: list[int]
    what: list[tuple[int, Action]]
    first: list[int]
    last: list[int]


@lru_cache(maxsize=512)
def _program(table: Table) -> _Program:
    pp, stages = len(table.rows), table.num_stages
    done: dict[tuple[str, int, int], int] = {}
    program = _Program([0], [0], [0], [0], [(0, Action("", 0, 0))], [0] * pp, [0] * pp)
    last, position, remaining = program.last, [0] * pp, sum(len(row) for row in table.rows)

    def need(rank: int, action: Action) -> tuple[int, int] | None:
        """What an action waits for besides its rank, and whether that comes from another rank."""
        stage, i = stage_of(table.placement, pp, rank, action.chunk), action.micro_batch
        forward, own = action.kind == "F", done.get(("F", stage, i))
        if action.kind == "W":
            return None if ("I", stage, i) not in done else (0, 0)
        if not forward and own is None:
            return None
        if stage == (0 if forward else stages - 1):
            return 0, 0
        near = stage - 1 if forward else stage + 1
        found = done.get(("F" if forward else "I", near, i))
        if found is None:
            return None
        return found, int(program.what[found][0] != rank)

    def add(rank: int, needs: tuple[int, int], price: int, action: Action) -> None:
        program.previous.append(last[rank])
        program.needed.append(needs[0])
        program.remote.append(needs[1])
        program.price.append(price)
        program.what.append((rank, action))
        last[rank] = len(program.what) - 1
        program.first[rank] = program.first[rank] or last[rank]

    def finish(rank: int, action: Action) -> None:
        stage = stage_of(table.placement, pp, rank, action.chunk)
        done["I" if action.kind == "B" else action.kind, stage, action.micro_batch] = last[rank]

    free = 4 * stages + 2 * pp  # the price of nothing
    while remaining:
        before = remaining
        for rank, row in enumerate(table.rows):
            while position[rank] < len(row):
                item = row[position[rank]]
                actions = item if isinstance(item, Pair) else (item,)
                needs = [found for action in actions if (found := need(rank, action)) is not None]
                if len(needs) < len(actions):
                    break
                if isinstance(item, Pair):
                    add(rank, needs[0], free, item.forward)
                    add(rank, needs[1], 4 * stages + 2 * rank + item.forward.chunk, item.backward)
                    finish(rank, item.forward)
                else:
                    stage = stage_of(table.placement, pp, rank, item.chunk)
                    add(rank, needs[0], _KINDS.index(item.kind) * stages + stage, item)
                finish(rank, actions[-1])
                position[rank] += 1
                remaining -= 1
        if remaining == before:
            stuck = [str(row[at]) for row, at in zip(table.rows, position, strict=True) if at < len(row)]
            raise InputError(f"the schedule deadlocks: {', '.join(stuck)} wait for each other")
    return program


def _prices(table: Table, times: StageTimes) -> list[float]:
    """Seconds by the numbers of `_Program.price`."""
    pp = len(table.rows)
    forward, ahead, behind = list(times.forward), list(times.input_gradient), list(times.weight_gradient)
    backward = [i + w for i, w in zip(ahead, behind, strict=True)]
    prices = [*forward, *backward, *ahead, *behind]
    for rank in range(pp):
        if times.pair is not None:
            prices += times.pair[rank]
        elif table.chunks == 2:
            a, b = (stage_of(table.placement, pp, rank, chunk) for chunk in (0, 1))
            prices += forward[a] + backward[b], forward[b] + backward[a]
        else:
            prices += 0.0, 0.0
    return [*prices, 0.0]


def _ends(table: Table, times: StageTimes) -> tuple[_Program, list[float], list[float]]:
    program = _program(table)
    prices = _prices(table, times)
    lags = (0.0, times.lag)
    end = [0.0]
    put = end.append
    steps = zip(program.previous, program.needed, program.remote, program.price, strict=True)
    next(steps)
    for previous, needed, remote, price in steps:
        start, ready = end[previous], end[needed] + lags[remote]
        put((start if start > ready else ready) + prices[price])
    return program, prices, end


def simulated_time(table: Table, times: StageTimes, synchronised: bool = True) -> float:
    """Seconds from one step to the next.

    Parameters
    ----------
    table : Table
    times : StageTimes
    synchronised : bool
        All ranks wait for each other between steps: the end of the last action. Otherwise a rank goes on with its next
        step when it is through with this one, and the longest span of a rank is what counts (arXiv:2401.10241,
        section 4).
    """
    program, prices, end = _ends(table, times)
    if synchronised:
        return max(end)
    return max(
        end[last] - end[first] + prices[program.price[first]]
        for first, last in zip(program.first, program.last, strict=True)
    )


def simulate(table: Table, times: StageTimes) -> Timeline:
    """Run an action table event by event.

    Parameters
    ----------
    table : Table
    times : StageTimes

    Returns
    -------
    Timeline

    Raises
    ------
    InputError
        The actions wait for each other.

    Examples
    --------
    >>> row = (Action("F", 0, 0), Action("B", 0, 0))
    >>> table = Table(placement="loop", chunks=1, rows=(row, row))
    >>> times = StageTimes(forward=[1.0, 1.0], input_gradient=[1.0, 1.0], weight_gradient=[1.0, 1.0], lag=0.5)
    >>> simulate(table, times).total_s, simulate(table, times).bubble_s
    (7.0, (4.0, 4.0))
    """
    program, prices, end = _ends(table, times)
    pp = len(table.rows)
    busy = [0.0] * pp
    starts: list[dict[Action, float]] = [{} for _ in range(pp)]
    for at in range(1, len(end)):
        rank, action = program.what[at]
        seconds = prices[program.price[at]]
        busy[rank] += seconds
        starts[rank][action] = end[at] - seconds
    ends = tuple(end[last] for last in program.last)
    return Timeline(total_s=max(end), busy_s=tuple(busy), start_s=tuple(starts), end_s=ends)


def held_peak(actions: Sequence[Action], kept: Sequence[float], pending: Sequence[float]) -> tuple[float, Action]:
    """The most that a rank holds, and the action that brings it there.

    Parameters
    ----------
    actions : sequence of Action
        Of one rank, in order.
    kept : sequence of float
        By chunk: what a forward leaves behind for the backward pass.
    pending : sequence of float
        By chunk: what of it, with the gradients of outputs, stays between input and weight gradient.
    """
    held, most, moment = 0.0, 0.0, actions[0]
    for action in actions:
        kind, chunk = action.kind, action.chunk
        if kind == "F":
            held += kept[chunk]
        elif kind == "B":
            held -= kept[chunk]
        elif kind == "I":
            held += pending[chunk] - kept[chunk]
        else:
            held -= pending[chunk]
        if held > most:
            most, moment = held, action
    return most, moment
