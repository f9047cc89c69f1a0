"""What no prediction could get right: how far measurements of one configuration differ, and points that stand out.

A model answers the same question with the same number. Where a table asks it more than once (two hosts with the same
links, two runs of one benchmark) the measured times differ, and the error that is left when each of them is predicted
by the median of the others is a floor under that of any model. A single sweep shows its own jitter where a larger
message takes less time than a smaller one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from simllm.validation.collectives import REGIMES, CollectiveResult, Farthest
from simllm.validation.scoring import Outcome, Score, score_by

__all__ = ["farthest_off", "noise_floor"]

# By how much a smaller message must take longer than a larger one to stand out.
_JITTER = 1.1


def noise_floor(rows: Sequence[CollectiveResult]) -> dict[str, Score]:
    """By regime: errors of points that were measured more than once, each predicted by the median of the others.

    Parameters
    ----------
    rows : sequence of CollectiveResult
        Of `simllm.validation.collectives.validate_collectives`.
    """
    twins = _twins(rows)
    outcomes = [
        (row.regime, Outcome(key=row.id, predicted=median(others), measured=row.measured_time_s))
        for row in rows
        if row.measured_time_s is not None and (others := _others(row, twins))
    ]
    found = score_by(outcomes, lambda pair: pair[0], lambda pair: pair[1])
    return {name: found[name] for name, *_ in REGIMES if name in found}


def farthest_off(rows: Sequence[CollectiveResult], number: int) -> list[Farthest]:
    """The points farthest from their predictions, by the ratio of the two times, with what the table says against them.

    Parameters
    ----------
    rows : sequence of CollectiveResult
    number : int
        How many at most.
    """
    twins = _twins(rows)
    sweeps: dict[tuple[Any, ...], list[CollectiveResult]] = defaultdict(list)
    for row in rows:
        if row.measured_time_s is not None:
            sweeps[_sweep(row)].append(row)
    known = [row for row in rows if row.measured_time_s and row.predicted_time_s]
    known.sort(key=lambda row: -_ratio(row.predicted_time_s or 1.0, row.measured_time_s or 1.0))
    return [
        Farthest(
            row=row,
            error=(row.predicted_time_s or 0.0) / (row.measured_time_s or 1.0) - 1,
            seen=tuple(_seen(row, twins, sweeps[_sweep(row)])),
        )
        for row in known[:number]
    ]


def _seen(
    row: CollectiveResult, twins: dict[tuple[Any, ...], list[CollectiveResult]], sweep: Sequence[CollectiveResult]
) -> list[str]:
    """What the table shows against a point."""
    measured, size = row.measured_time_s or 0.0, row.size_bytes or 0.0
    said = []
    if row.machine == "assumed":
        said.append("machine assumed")
    if others := _others(row, twins):
        said.append(f"others of this configuration measured {median(others) / measured - 1:+.0%}")
    later = [one.measured_time_s or 0.0 for one in sweep if (one.size_bytes or 0.0) > size]
    before = [one.measured_time_s or 0.0 for one in sweep if (one.size_bytes or 0.0) < size]
    if later and min(later) * _JITTER < measured:
        said.append(f"a larger message took {min(later) / measured - 1:+.0%}")
    elif before and max(before) > measured * _JITTER:
        said.append(f"a smaller message took {max(before) / measured - 1:+.0%}")
    return said


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)


def _sweep(row: CollectiveResult) -> tuple[Any, ...]:
    return row.sweep, row.collective, row.ranks, row.system, row.predicted_time_s is None


def _twins(rows: Sequence[CollectiveResult]) -> dict[tuple[Any, ...], list[CollectiveResult]]:
    """Points that ask the model the same question."""
    found: dict[tuple[Any, ...], list[CollectiveResult]] = defaultdict(list)
    for row in rows:
        if row.measured_time_s is not None and row.predicted_time_s is not None:
            found[_question(row)].append(row)
    return found


def _question(row: CollectiveResult) -> tuple[Any, ...]:
    return row.collective, row.ranks, row.size_bytes, row.predicted_time_s


def _others(row: CollectiveResult, twins: dict[tuple[Any, ...], list[CollectiveResult]]) -> list[float]:
    """What the others measured that ask the same question."""
    return [one.measured_time_s or 0.0 for one in twins.get(_question(row), ()) if one.id != row.id]
