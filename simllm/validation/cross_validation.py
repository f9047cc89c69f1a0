"""Errors on collectives that a fit has not seen, as `simllm validate collectives --cross-validate` prints them.

The sweeps, or the systems they come from, are dealt into parts; for each part every figure of every link class is
fitted again to the others and the part is predicted. What the figures of the catalog reach on the points they were
fitted to says less: those are scored as if they were new.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from simllm.errors import InputError
from simllm.kernels.fitting import require_scipy
from simllm.network.calibrate import calibrate_all, predict
from simllm.network.fabric import fabric
from simllm.network.measurements import Sweep
from simllm.validation.collectives import REGIMES, regime
from simllm.validation.scoring import Outcome, Score, score, score_by

__all__ = ["Prediction", "cross_validate", "deal", "elsewhere", "left_out"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A sweep and what was predicted without it.

    Parameters
    ----------
    sweep : Sweep
        The measurements.
    times_s : tuple of float
        Predicted times of its points.
    system_seen : bool
        Whether other sweeps of its system were fitted.
    class_seen : bool
        Whether anything was fitted to its slowest link class; otherwise the class it is like stood in.
    """

    sweep: Sweep
    times_s: tuple[float, ...]
    system_seen: bool
    class_seen: bool


@dataclass(frozen=True, kw_only=True)
class _Point:
    """One size of a sweep that was left out."""

    regime: str
    class_seen: bool
    stated: bool
    outcome: Outcome


def deal(labels: Iterable[str], folds: int) -> dict[str, int]:
    """A fold for every label: the same on every machine, in equal numbers, whatever their order.

    Examples
    --------
    >>> sorted(deal(["a", "b", "c", "d"], 2).values())
    [0, 0, 1, 1]
    """
    distinct = sorted(set(labels), key=lambda label: hashlib.sha256(label.encode()).hexdigest())
    if not 2 <= folds <= len(distinct):
        raise InputError(f"folds={folds} must be at least 2 and at most {len(distinct)}, the number of things to deal")
    return {label: i % folds for i, label in enumerate(distinct)}


def left_out(sweeps: Sequence[Sweep], by: Literal["sweep", "system"] = "sweep", folds: int = 5) -> list[Prediction]:
    """Predict every sweep with figures fitted to the other folds.

    Parameters
    ----------
    sweeps : sequence of Sweep
        Measurements, those not ``fitted`` among them: they are predicted and never fitted.
    by : {"sweep", "system"}
        What is left out together: single sweeps, or all sweeps of a system, which is then unseen.
    folds : int
        Number of fits.
    """
    label = {"sweep": lambda s: s.name, "system": lambda s: s.system}.get(by)
    if label is None:
        raise InputError(f"by={by!r} is neither 'sweep' nor 'system'")
    fold_of = deal((label(sweep) for sweep in sweeps), folds)
    found = []
    for fold in range(folds):
        found += _predicted(
            [sweep for sweep in sweeps if fold_of[label(sweep)] != fold],
            [sweep for sweep in sweeps if fold_of[label(sweep)] == fold],
        )
    return found


def _predicted(seen: Sequence[Sweep], unseen: Sequence[Sweep]) -> list[Prediction]:
    classes = calibrate_all(seen)
    fitted = [sweep for sweep in seen if sweep.fitted]
    systems = {sweep.system for sweep in fitted}
    links = {_link(sweep) for sweep in fitted}
    return [
        Prediction(
            sweep=sweep,
            times_s=tuple(float(time) for time in predict(sweep, classes)),
            system_seen=sweep.system in systems,
            class_seen=_link(sweep) in links,
        )
        for sweep in unseen
    ]


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
        and by regime of points over link classes that nothing else was fitted to; of systems also what `elsewhere`
        says.

    Raises
    ------
    InputError
        Fewer sweeps than folds, less than two folds, or scipy is not installed.
    """
    require_scipy()
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
        predictions = left_out(sweeps, "sweep" if what == "sweeps" else "system", parts)
        scores = _scores(predictions)
        if what == "systems":
            scores |= elsewhere(predictions)
        found[what] = {name: result.to_dict() for name, result in scores.items()}
    return found


def elsewhere(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """What a measurement on other machines with the same devices is worth as a prediction, beside the model's.

    Systems with as many GPUs of one kind in a domain differ by their hosts and the versions of their software, which a
    table seldom states: where one of them was left out of the fit, what the others measured for the same collective,
    interpolated in the logarithms and the median of them, could have been used in place of a model.

    Parameters
    ----------
    predictions : sequence of Prediction
        Made without the system of each.

    Returns
    -------
    dict
        By regime, of the points that have such relatives: errors of their measurements, and those of the model.
    """
    relatives: dict[tuple[object, ...], list[Sweep]] = defaultdict(list)
    for found in predictions:
        if (question := _question(found.sweep)) is not None:
            relatives[question].append(found.sweep)
    points: dict[str, list[_Point]] = {", as others measured": [], ", the same points": []}
    for number, found in enumerate(predictions):
        others = [one for one in relatives.get(_question(found.sweep) or (), ()) if one.system != found.sweep.system]
        for point, size in zip(_points(number, found), found.sweep.sizes_bytes, strict=True):
            times = [time for one in others if (time := _interpolated(one, size)) is not None]
            if times:
                outcome = replace(point.outcome, predicted=median(times))
                points[", as others measured"].append(replace(point, outcome=outcome))
                points[", the same points"].append(point)
    return {name: result for what, some in points.items() for name, result in _by_regime(some, what).items()}


def _question(sweep: Sweep) -> tuple[object, ...] | None:
    """What machines with the same devices answer alike, if only those matter."""
    inside = fabric(sweep.cluster, sweep.group).out is None
    known = sweep.fitted and inside and sweep.group.ranks_per_process == 1
    return (sweep.cluster.accelerator.name, sweep.operation, sweep.group, sweep.algorithm) if known else None


def _interpolated(sweep: Sweep, size: float) -> float | None:
    """The time of a size between those measured, along a straight line in the logarithms."""
    import numpy as np

    sizes = np.asarray(sweep.sizes_bytes)
    if not sizes[0] <= size <= sizes[-1]:
        return None
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(sweep.times_s))))


def _scores(predictions: Sequence[Prediction]) -> dict[str, Score]:
    points = [point for number, found in enumerate(predictions) for point in _points(number, found)]
    scores = {"all": score(point.outcome for point in points)} | _by_regime(points, "")
    if not all(point.stated for point in points):
        scores |= _by_regime([point for point in points if point.stated], ", machine stated")
    return scores | _by_regime([point for point in points if not point.class_seen], ", no other sweep over such links")


def _by_regime(points: Sequence[_Point], what: str) -> dict[str, Score]:
    found = score_by(points, lambda point: point.regime, lambda point: point.outcome)
    return {f"{name}{what}": found[name] for name, *_ in REGIMES if name in found}


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


def _link(sweep: Sweep) -> str:
    """The link class that decides a sweep: the one between domains where it leaves its own."""
    view = fabric(sweep.cluster, sweep.group)
    return (view.out or view.up).name
