"""Errors of predictions: medians per configuration first, so that a run repeated nine times counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TypeVar

__all__ = ["Outcome", "Score", "percentile", "score", "score_by", "spearman", "typical"]

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A prediction beside its measurement.

    Attributes
    ----------
    key : str
        Equal for repeated measurements of one configuration.
    predicted, measured : float
    predicted_utilisation, measured_utilisation : float or None
        Both against the same FLOPs and the same peak.
    """

    key: str
    predicted: float
    measured: float
    predicted_utilisation: float | None = None
    measured_utilisation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Errors over configurations; percentages are of the measurement, None where nothing was counted.

    Attributes
    ----------
    count : int
        Configurations, not rows.
    mean_absolute_percentage_error, median_absolute_percentage_error, p90_absolute_percentage_error : float or None
    bias : float or None
        Mean of the signed errors in per cent; above zero: predicted too much.
    spearman : float or None
        Rank correlation of utilisation, where it is known, otherwise of the quantity itself.
    spearman_value : float or None
        Rank correlation of the quantity itself; step times span orders of magnitude, so this is high for anything
        that counts FLOPs.
    """

    count: int
    mean_absolute_percentage_error: float | None = None
    median_absolute_percentage_error: float | None = None
    p90_absolute_percentage_error: float | None = None
    bias: float | None = None
    spearman: float | None = None
    spearman_value: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data."""
        return asdict(self)


def typical(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome per configuration: the medians of its predictions and of its measurements."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.key, []).append(outcome)
    return [
        Outcome(
            key=key,
            predicted=median(o.predicted for o in group),
            measured=median(o.measured for o in group),
            predicted_utilisation=_median(o.predicted_utilisation for o in group),
            measured_utilisation=_median(o.measured_utilisation for o in group),
        )
        for key, group in groups.items()
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def score(outcomes: Iterable[Outcome]) -> Score:
    """The errors of outcomes, one vote for each configuration.

    Examples
    --------
    >>> one = score([Outcome(key="a", predicted=9, measured=10), Outcome(key="b", predicted=6, measured=5)])
    >>> one.count, one.mean_absolute_percentage_error, one.bias
    (2, 15.0, 5.0)
    """
    keys = typical(outcomes)
    if not keys:
        return Score(count=0)
    errors = [100 * (o.predicted - o.measured) / o.measured for o in keys]
    sizes = sorted(abs(error) for error in errors)
    of_time = spearman([o.predicted for o in keys], [o.measured for o in keys])
    known = [
        (o.predicted_utilisation, o.measured_utilisation)
        for o in keys
        if o.predicted_utilisation is not None and o.measured_utilisation is not None
    ]
    return Score(
        count=len(keys),
        mean_absolute_percentage_error=fmean(sizes),
        median_absolute_percentage_error=median(sizes),
        p90_absolute_percentage_error=percentile(sizes, 0.9),
        bias=fmean(errors),
        spearman=spearman([p for p, _ in known], [m for _, m in known]) if known else of_time,
        spearman_value=of_time,
    )


def score_by(
    items: Iterable[Item], group: Callable[[Item], str], outcome: Callable[[Item], Outcome]
) -> dict[str, Score]:
    """The errors by a property of the items, the largest groups first."""
    groups: dict[str, list[Outcome]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(outcome(item))
    scores = {name: score(outcomes) for name, outcomes in groups.items()}
    return dict(sorted(scores.items(), key=lambda pair: (-pair[1].count, pair[0])))


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The percentile of sorted values, linear between neighbours.

    >>> percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.9)
    4.6
    """
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None for fewer than three pairs or without variation.

    >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    >>> spearman([1, 1, 1], [1, 2, 3]) is None
    True
    """
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) + 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return covariance / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            ranks[index] = (start + end) / 2 + 1
        start = end + 1
    return ranks
