"""Errors on collectives that a fit has not seen, as `simllm validate collectives --cross-validate` prints them.

The fits are those of `simllm.network.crossvalidate`: every figure of every link class again without a part of the
sweeps, and again without a part of the systems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from simllm.errors import InputError
from simllm.network import crossvalidate
from simllm.network.crossvalidate import Prediction
from simllm.network.measurements import Sweep
from simllm.validation.collectives import REGIMES, regime
from simllm.validation.scoring import Outcome, Score, score, score_by

__all__ = ["cross_validate"]


@dataclass(frozen=True, kw_only=True)
class _Point:
    """One size of a sweep that was left out."""

    regime: str
    class_seen: bool
    stated: bool
    outcome: Outcome


def cross_validate(
    sweeps: Sequence[Sweep], folds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Errors of what was left out of the fit, by sweeps and by systems, as plain data.

    Parameters
    ----------
    sweeps : sequence of Sweep
    folds : int
        Parts into which the sweeps, and then the systems, are dealt; each is predicted from the others. Fewer systems
        than that are a part each, and a single one is not left out.
    progress : callable, optional
        Called with the kinds of parts done (sweeps, systems) and their number.

    Returns
    -------
    dict
        For ``sweeps`` and ``systems``: errors overall, by regime, by regime without machines that are only guessed at,
        and of points over link classes that nothing else was fitted to.

    Raises
    ------
    InputError
        Fewer sweeps than folds, or less than two folds.
    """
    labels = {"sweeps": {sweep.name for sweep in sweeps}, "systems": {sweep.system for sweep in sweeps}}
    if not 2 <= folds <= len(labels["sweeps"]):
        raise InputError(f"--cross-validate={folds} must be from 2 to {len(labels['sweeps'])}, the sweeps in the file")
    found: dict[str, Any] = {}
    for done, what in enumerate(labels):
        parts = min(folds, len(labels[what]))
        if parts < 2:
            continue
        if progress is not None:
            progress(done, len(labels))
        predictions = crossvalidate.cross_validate(sweeps, "sweep" if what == "sweeps" else "system", parts)
        found[what] = {name: result.to_dict() for name, result in _scores(predictions).items()}
    return found


def _scores(predictions: Sequence[Prediction]) -> dict[str, Score]:
    points = [point for number, found in enumerate(predictions) for point in _points(number, found)]
    by_regime = score_by(points, lambda point: point.regime, lambda point: point.outcome)
    scores = {"all": score(point.outcome for point in points)}
    scores |= {name: by_regime[name] for name, *_ in REGIMES if name in by_regime}
    if not all(point.stated for point in points):
        stated = score_by((p for p in points if p.stated), lambda point: point.regime, lambda point: point.outcome)
        scores |= {f"{name}, machine stated": stated[name] for name, *_ in REGIMES if name in stated}
    unseen = [point.outcome for point in points if not point.class_seen]
    return scores | ({"no other sweep over such links": score(unseen)} if unseen else {})


def _points(number: int, found: Prediction) -> list[_Point]:
    sweep = found.sweep
    return [
        _Point(
            regime=regime(size),
            class_seen=found.class_seen,
            stated=sweep.fitted,
            outcome=Outcome(key=f"{number}/{index}", predicted=predicted, measured=measured),
        )
        for index, (size, measured, predicted) in enumerate(
            zip(sweep.sizes_bytes, sweep.times_s, found.times_s, strict=True)
        )
    ]
