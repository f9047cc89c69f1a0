"""Errors on collectives that a fit has not seen: link classes fitted again without some sweeps, or some systems.

Only the figures of a class that come from a fit are fitted again; those of datasheets and papers stay. What the sweeps
that are left do not tell of a class is that of its nearest kin: the class of the same scope with the most sweeps, of
those whose sweeps tell it. Where they tell nothing, a time follows from the links and their kind alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simllm.errors import InputError
from simllm.hardware.links import Link
from simllm.hardware.profiles import figures_of
from simllm.network.calibrate import FIT, Sweep, calibrate
from simllm.network.fabric import Fabric, fabric
from simllm.network.price import choices, fastest
from simllm.validation.collectives import REGIMES, regime
from simllm.validation.link_fit import tells, with_figures
from simllm.validation.scoring import Outcome, Score, score, score_by

__all__ = ["LeftOut", "cross_validate"]

#: The same folds on every run.
_SEED = 0

#: Fewer points for each figure do not tell it.
_POINTS_A_FIGURE = 3

#: What is left out: sweeps, or all sweeps of a system.
_LABELS = ("sweeps", "systems")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A point that the fit did not see.

    Attributes
    ----------
    sweep, system, regime : str
    kin : bool
        Whether no sweep over its link class was left to fit.
    outcome : Outcome
    """

    sweep: str
    system: str
    regime: str
    kin: bool
    outcome: Outcome


def cross_validate(
    sweeps: Sequence[Sweep], folds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Errors of sweeps left out of the fit, by sweeps and by systems, as plain data.

    Parameters
    ----------
    sweeps : sequence of Sweep
    folds : int
        Parts into which the sweeps, and then the systems, are dealt; each is predicted from the others. Fewer systems
        than that are a part each, and a single one is not left out.
    progress : callable, optional
        Called with the fits done and their number.

    Returns
    -------
    dict
        For ``sweeps`` and ``systems``: errors overall, by regime, and of points whose link class had no other sweep.

    Raises
    ------
    InputError
        Fewer sweeps than folds, or less than two folds.
    """
    parts = {by: min(folds, len({_label(sweep, by) for sweep in sweeps})) for by in _LABELS}
    if folds < 2 or parts["sweeps"] < folds:
        most = len({_label(sweep, "sweeps") for sweep in sweeps})
        raise InputError(f"--cross-validate={folds} must be from 2 to {most}, the sweeps that there are")
    found: dict[str, Any] = {}
    done = 0
    for by in _LABELS:
        if parts[by] < 2:
            continue
        points: list[LeftOut] = []
        for out in _dealt({_label(sweep, by) for sweep in sweeps}, parts[by]):
            if progress is not None:
                progress(done, sum(parts.values()))
            done += 1
            points += _left_out(sweeps, out, by)
        scores: dict[str, Score] = {"all": score(point.outcome for point in points)}
        by_regime = score_by(points, lambda point: point.regime, lambda point: point.outcome)
        scores |= {name: by_regime[name] for name, _ in REGIMES if name in by_regime}
        kin = [point.outcome for point in points if point.kin]
        if kin:
            scores["no other sweep over such links"] = score(kin)
        found[by] = {name: result.to_dict() for name, result in scores.items()}
    return found


def _dealt(labels: Iterable[str], parts: int) -> list[set[str]]:
    """Labels dealt into parts, the same way on every run."""
    ordered = sorted(labels)
    random.Random(_SEED).shuffle(ordered)
    return [set(ordered[part::parts]) for part in range(parts)]


def _left_out(sweeps: Sequence[Sweep], out: set[str], by: str) -> list[LeftOut]:
    """The points of the sweeps with the labels ``out``, predicted from the others."""
    views = [fabric(sweep.cluster, sweep.group) for sweep in sweeps]
    seen = [sweep for sweep in sweeps if _label(sweep, by) not in out and sweep.fitted]
    classes, kin = _fitted_classes(views, seen)
    points: list[LeftOut] = []
    for number, (sweep, view) in enumerate(zip(sweeps, views, strict=True)):
        if _label(sweep, by) in out:
            points += _points(number, sweep, view, classes, kin)
    return points


def _label(sweep: Sweep, by: str) -> str:
    """What is left out together."""
    return sweep.system if by == "systems" else f"{sweep.name}/{sweep.operation}/{sweep.group.size}/{sweep.algorithm}"


def _fitted_classes(views: Iterable[Fabric], seen: Sequence[Sweep]) -> tuple[dict[Link, Link], set[str]]:
    """Every link class as the sweeps seen tell it, and the names of those of which they tell nothing."""
    members: dict[str, list[tuple[Sweep, Fabric]]] = {}
    for sweep in seen:
        view = fabric(sweep.cluster, sweep.group)
        members.setdefault((view.out or view.up).name, []).append((sweep, view))
    links = dict.fromkeys(link for view in views for link in (view.up, view.out) if link is not None)
    classes: dict[Link, Link] = {}
    told: dict[Link, list[str]] = {}
    for link in links:
        own = members.get(link.name, [])
        points = sum(len(sweep.sizes_bytes) for sweep, _ in own)
        paths = [path for path in _paths(link) if tells(link, path, own)]
        told[link] = paths if points >= _POINTS_A_FIGURE * len(paths) else []
        fitted = calibrate(link, [sweep for sweep, _ in own], told[link]).link if told[link] else link
        classes[link] = fitted
    for link in links:
        classes[link] = with_figures(
            classes[link],
            {
                path: figures_of(classes[kin])[path]
                for path in _paths(link)
                if path not in told[link] and (kin := _nearest(link, path, told, members)) is not None
            },
        )
    return classes, {link.name for link in links if _paths(link) and not told[link]}


def _paths(link: Link) -> list[str]:
    """Key paths of the figures that come from a fit."""
    return [path for path, figure in figures_of(link).items() if figure.source.startswith(FIT)]


def _nearest(
    link: Link, path: str, told: dict[Link, list[str]], members: dict[str, list[tuple[Sweep, Fabric]]]
) -> Link | None:
    """The class of the same scope with the most sweeps, of those whose sweeps tell a figure."""
    able = [other for other, paths in told.items() if path in paths and other.scope == link.scope]
    return max(able, key=lambda other: len(members[other.name]), default=None)


def _points(number: int, sweep: Sweep, view: Fabric, classes: dict[Link, Link], kin: set[str]) -> list[LeftOut]:
    import numpy as np

    out = view.out if view.out is None else classes.get(view.out, view.out)
    trial = replace(view, up=classes.get(view.up, view.up), out=out)
    times = fastest(choices(sweep.operation, trial, sweep.algorithm), np.asarray(sweep.sizes_bytes))
    decides = view.up if view.out is None else view.out
    return [
        LeftOut(
            sweep=sweep.name,
            system=sweep.system,
            regime=regime(size),
            kin=decides.name in kin,
            outcome=Outcome(key=f"{number}/{index}", predicted=float(predicted), measured=measured),
        )
        for index, (size, measured, predicted) in enumerate(zip(sweep.sizes_bytes, sweep.times_s, times, strict=True))
    ]
