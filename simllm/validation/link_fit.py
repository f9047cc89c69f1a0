"""Measured collectives into figures of link classes: `simllm calibrate collectives`.

The fit itself is `simllm.network.calibrate`; here the measurements find the links that decide them, and the figures
that they can tell are chosen: those whose change changes a predicted time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from simllm.errors import InputError
from simllm.hardware.figures import Count
from simllm.hardware.links import Link
from simllm.hardware.profiles import figures_of
from simllm.kernels.fitting import require_scipy
from simllm.network import bus_factor
from simllm.network.calibrate import FIT, calibrate, predict, with_figures
from simllm.network.fabric import fabric
from simllm.network.measurements import Sweep
from simllm.validation.collective_rows import Measurement, measurement
from simllm.validation.scoring import percentile
from simllm.validation.table import Row

__all__ = [
    "FittedSweep",
    "LinkFit",
    "Measured",
    "error_summary",
    "fit_links",
    "measured_sweeps",
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sweeps that a file holds, and what in it could not be used.

    Attributes
    ----------
    sweeps : tuple of Sweep
    left_out : dict of str to int
        Rows by the reason why they are not part of a sweep.
    assumptions : tuple of str
        What the rows that are used do not state.
    """

    sweeps: tuple[Sweep, ...]
    left_out: dict[str, int]
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FittedSweep:
    """A sweep with its times before and after the fit, seconds."""

    sweep: Sweep
    before_s: tuple[float, ...]
    fitted_s: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """Fitted over measured less one, by size."""
        return tuple(f / m - 1 for f, m in zip(self.fitted_s, self.sweep.times_s, strict=True))

    @property
    def bus_factor(self) -> float:
        """busbw over algbw."""
        return bus_factor(self.sweep.operation, self.sweep.group.size)


@dataclass(frozen=True, kw_only=True)
class LinkFit:
    """A link class fitted to sweeps.

    Attributes
    ----------
    before, link : Link
        The class of the catalog, and the same with fitted figures.
    paths : tuple of str
        Key paths of the figures that were fitted.
    sweeps : tuple of FittedSweep
        The measurements.
    """

    before: Link
    link: Link
    paths: tuple[str, ...]
    sweeps: tuple[FittedSweep, ...]

    @property
    def points(self) -> int:
        """Measured points."""
        return sum(len(found.fitted_s) for found in self.sweeps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        old, new = figures_of(self.before), figures_of(self.link)
        return {
            "name": self.link.name,
            "scope": self.link.scope,
            "points": self.points,
            **error_summary([error for found in self.sweeps for error in found.errors]),
            "figures": {
                path: {"before": old[path].value, "fitted": new[path].value, "unit": new[path].unit}
                for path in self.paths
            },
            "sweeps": [
                {
                    "name": found.sweep.name,
                    "operation": found.sweep.operation,
                    "cluster": found.sweep.cluster.name,
                    "ranks": found.sweep.group.size,
                    "stride": found.sweep.group.stride,
                    "algorithm": found.sweep.algorithm,
                    **error_summary(found.errors),
                    "residuals": [
                        {"size_bytes": size, "measured_time_s": measured, "fitted_time_s": fitted, "error": error}
                        for size, measured, fitted, error in zip(
                            found.sweep.sizes_bytes, found.sweep.times_s, found.fitted_s, found.errors, strict=True
                        )
                    ],
                }
                for found in self.sweeps
            ],
        }


def error_summary(errors: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile and mean of relative errors, in per cent."""
    sizes = sorted(abs(error) for error in errors)
    return {
        "median_absolute_percentage_error": 100 * percentile(sizes, 0.5),
        "p90_absolute_percentage_error": 100 * percentile(sizes, 0.9),
        "bias": 100 * sum(errors) / len(errors),
    }


def measured_sweeps(rows: Iterable[Row], cluster: str | None = None) -> Measured:
    """Rows as sweeps: one for each label, operation, machine, group and forced algorithm.

    Parameters
    ----------
    rows : iterable of Row
        Of a table or a log, see `simllm.validation.collectives.read_rows`.
    cluster : str, optional
        Where all of them ran.

    Raises
    ------
    InputError
        A size or a time is no positive number, or no row can be used.
    """
    points: dict[tuple[Any, ...], list[Measurement]] = {}
    systems: dict[tuple[Any, ...], str] = {}
    left_out: Counter[str] = Counter()
    assumptions: dict[str, None] = {}
    for row in rows:
        if row.flag("usable") is not False:
            for cell in ("message_bytes", "time_us"):
                try:
                    row.number(cell)
                except InputError as error:
                    raise InputError(f"line {row.line}: {error}") from None
        try:
            found = measurement(row, cluster)
            if found.group.size < 2:
                raise InputError("one rank alone has nothing to exchange")
            found.price()
        except InputError as error:
            left_out[str(error)] += 1
            continue
        key = (row.text("sweep"), found.operation, found.cluster, found.group, found.algorithm)
        points.setdefault(key, []).append(found)
        systems.setdefault(key, row.text("system") or found.cluster.name)
        assumptions |= dict.fromkeys(row.assumptions)
    if not points:
        reason, number = left_out.most_common(1)[0]
        raise InputError(f"no row can be used; {number} of {left_out.total()} because: {reason}")
    sweeps = [_sweep(key, systems[key], members) for key, members in points.items()]
    return Measured(sweeps=tuple(sweeps), left_out=dict(left_out.most_common()), assumptions=tuple(assumptions))


def _sweep(key: tuple[Any, ...], system: str, points: list[Measurement]) -> Sweep:
    label, first = key[0], points[0]
    points = sorted(points, key=lambda point: point.size_bytes)
    return Sweep(
        name=label or f"{first.operation} of {first.group.size}",
        system=system,
        operation=first.operation,
        cluster=first.cluster,
        group=first.group,
        algorithm=first.algorithm,
        sizes_bytes=tuple(point.size_bytes for point in points),
        times_s=tuple(point.time_s for point in points),
        fitted=all(point.fitted for point in points),
    )


def fit_links(
    sweeps: Iterable[Sweep],
    source: str,
    only: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LinkFit]:
    """Fit every link class that decides one of the sweeps, those inside domains first.

    Parameters
    ----------
    sweeps : iterable of Sweep
    source : str
        What the measurements are, for the source of the fitted figures.
    only : str, optional
        Fit one class of them.
    progress : callable, optional
        Called with the classes done and their number.

    Raises
    ------
    InputError
        No sweep runs over ``only``, there are fewer points than figures, or scipy is not installed.
    """
    require_scipy()
    members: dict[Link, list[Sweep]] = {}
    for sweep in sweeps:
        view = fabric(sweep.cluster, sweep.group)
        members.setdefault(view.out or view.up, []).append(sweep)
    names = [link.name for link in members]
    if only is not None:
        members = {link: found for link, found in members.items() if link.name == only}
        if not members:
            raise InputError(f"no sweep runs over --link={only}; the file holds measurements of {', '.join(names)}")
    ordered = sorted(members, key=lambda link: link.scope == "scale-out")
    fits = []
    for number, link in enumerate(ordered):
        if progress is not None:
            progress(number, len(ordered))
        fits.append(_fit(link, members[link], source))
    return fits


def _fit(link: Link, sweeps: Sequence[Sweep], source: str) -> LinkFit:
    paths = [path for path in _candidates(link) if _tells(link, path, sweeps)]
    points = sum(len(sweep.sizes_bytes) for sweep in sweeps)
    if points < len(paths):
        raise InputError(
            f"{points} point{'s' if points > 1 else ''} over {link.name} cannot tell its {len(paths)} figures; "
            "give a sweep over sizes, such as -b 8 -e 8G -f 2"
        )
    # What the measurements leave open stays near the catalog's figures of this class, not near those of its kin.
    own = {link.like: link} if link.like else {}
    told = [sweep for sweep in sweeps if sweep.fitted] or [replace(sweep, fitted=True) for sweep in sweeps]
    values = figures_of(calibrate(link, told, paths, classes=own).link)
    said = f"{FIT} to {source}, {points} points"
    fitted = with_figures(
        link, {path: msgspec.structs.replace(values[path], source=said, basis="measured", note=None) for path in paths}
    )
    return LinkFit(
        before=link,
        link=fitted,
        paths=tuple(paths),
        sweeps=tuple(
            FittedSweep(
                sweep=sweep,
                before_s=tuple(predict(sweep).tolist()),
                fitted_s=tuple(predict(sweep, {link.name: fitted}).tolist()),
            )
            for sweep in sweeps
        ),
    )


def _candidates(link: Link) -> list[str]:
    """Key paths of figures that a fit may move: durations, parts, rates and slots, not numbers or what is believed."""
    believed = ("tuning.", "all_to_all.channel.")
    return [
        path
        for path, figure in figures_of(link).items()
        if not isinstance(figure, Count) and not f"{path}.".startswith(believed)
    ]


def _tells(link: Link, path: str, sweeps: Sequence[Sweep]) -> bool:
    """Whether a figure matters: a fifth less of it changes a predicted time by more than a hundredth."""
    import numpy as np

    figure = figures_of(link)[path]
    other = figure.value * 0.8 if figure.value else 1e-2
    changed = {link.name: with_figures(link, {path: msgspec.structs.replace(figure, value=other)})}
    return any(bool(np.any(np.abs(predict(sweep, changed) / predict(sweep) - 1) > 1e-2)) for sweep in sweeps)
