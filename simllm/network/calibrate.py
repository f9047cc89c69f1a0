"""Fit the figures of the link classes to published collectives.

Only collectives are fitted, never training runs. A fit moves the figures that no datasheet gives so that the
logarithm of predicted over measured time is small in the sense of a soft absolute value: a point that is twice too slow
weighs as much as one twice too fast, and a congested point does not drag the others along. Where the measurements of a
class leave a figure open, it stays near that of the class it is most like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from simllm.errors import InputError
from simllm.hardware.figures import Figure
from simllm.hardware.links import Link, list_links, load_link
from simllm.hardware.profiles import figures_of
from simllm.network.fabric import Fabric, fabric
from simllm.network.measurements import Sweep
from simllm.network.posting import posting_s
from simllm.network.price import choices, fastest
from simllm.units import to_si

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FIT", "Calibration", "Sweep", "calibrate", "calibrate_all", "predict", "with_figures"]

Part = TypeVar("Part", bound=msgspec.Struct)

#: How the source of a figure begins that `calibrate` fitted.
FIT = "fit of simllm.network.calibrate"

# Pull towards the class that this one is like, in units of the residuals: a figure off by a factor of e weighs as much
# as one point that is off by a fifth.
_PULL = 0.2

# The same for the part of a wire that large messages reach: libraries lose a tenth or two of a wire whatever its kind,
# while latencies differ by factors. Off by a tenth, such a figure weighs as much as a point that is off by a tenth.
_PULL_EFFICIENCY = 1.0

# More bytes never take less time, but a measurement may fall into a pause of the machine. What is slower than a larger
# message of its sweep by so much is not fitted, though it is judged; where protocols change, libraries lose up to 1.2.
_DISTURBED = 1.25

# Sizes at which a library may change protocol are powers of two; those that are tried, in bytes.
_SLOTS = tuple(float(2**power) for power in range(10, 25))

# Parts of a link class that the time of an operation depends on; all others are rings or trees.
_RINGS = ("ring", "tree", "pair", "switch", "pat", "posting")
_PARTS = {
    "broadcast": ("broadcast", "ring", "posting"),
    "all_to_all": ("all_to_all", "posting"),
    "send_recv": ("p2p", "posting"),
}

_EFFICIENCIES = tuple(f"{part}.efficiency" for part in (*_RINGS, "broadcast", "all_to_all", "p2p"))

_BY_CLASS = re.compile(r"as (\S+) by class")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted link class.

    Parameters
    ----------
    link : Link
        The class with its fitted figures.
    points : int
        Measured points used.
    median_error, p90_error : float
        Of the absolute relative errors of the times, after the fit.
    """

    link: Link
    points: int
    median_error: float
    p90_error: float


def calibrate(
    link: Link,
    sweeps: Iterable[Sweep],
    paths: Sequence[str] | None = None,
    *,
    classes: Mapping[str, Link] | None = None,
) -> Calibration:
    """Fit the measured figures of a link class to the sweeps that run over it.

    Parameters
    ----------
    link : Link
        Class whose figures are the starting point.
    sweeps : iterable of Sweep
        Measurements; those over other links and those not ``fitted`` are ignored. A scale-up class is fitted to sweeps
        inside one domain, a scale-out class to sweeps across domains, with the classes inside as they are.
    paths : sequence of str, optional
        Key paths of the figures to fit, for example ``("ring.efficiency", "ring.launch")``; those that say in their
        source that they come from such a fit by default.
    classes : mapping, optional
        Link classes to use in place of those of the catalog, by name.

    Returns
    -------
    Calibration
        The class with fitted figures and the errors that remain.
    """
    import numpy as np
    from scipy.optimize import least_squares

    known = classes or {}
    family = _family(link, known)
    used = [
        (_undisturbed(s), view)
        for s in sweeps
        if s.fitted
        for one in family
        if (view := _view(one, s, known)) is not None
    ]
    if not used:
        raise InputError(f"no sweep runs over {link.name}; give measurements of a system with such links")
    figures = figures_of(link)
    wanted = list(paths or [path for path, figure in figures.items() if figure.source.startswith(FIT)])
    slots = [path for path in wanted if path.endswith(".slot")]
    smooth = [path for path in wanted if path not in slots]
    measured = np.log(np.concatenate([sweep.times_s for sweep, _ in used]))
    arrays = [np.asarray(sweep.sizes_bytes) for sweep, _ in used]
    start = np.log([max(figures[path].value, 1e-3) for path in smooth])
    upper = np.log([0.99 if figures[path].unit == "fraction" and "copy" not in path else 1e4 for path in smooth])
    start = np.minimum(start, upper - 1e-6)
    near = _near(link, known)
    centre = np.log([max(near.get(path, figures[path].value), 1e-3) for path in smooth])

    pulls = np.array([_PULL_EFFICIENCY if path in _EFFICIENCIES else _PULL for path in smooth])

    # Send and receive follow the all-to-all and have no say in it: of those sweeps only the sum of its constants shows.
    own = {path: there for path, there in _own_kin(link).items() if there in smooth and not path.startswith("p2p.")}

    def with_logs(base: Link, logs: NDArray[np.float64]) -> Link:
        values = dict(zip(smooth, np.exp(logs), strict=True))
        return _with_values(base, values | {path: values[there] for path, there in own.items()})

    priced: list[Any] = [None] * len(used)

    def errors(trial: Link) -> NDArray[np.float64]:
        tried = {one.name: _like(one, trial) for one in family}
        for i, (sweep, view) in enumerate(used):
            # A sweep is priced again only if a part of the class changed that its operation uses.
            here = tuple(getattr(trial, part) for part in _PARTS.get(sweep.operation, _RINGS))
            if priced[i] is None or priced[i][0] != here:
                priced[i] = here, _times(sweep, _with_classes(view, tried), arrays[i])
        return np.asarray(np.log(np.concatenate([times for _, times in priced])) - measured)

    def residuals(logs: NDArray[np.float64], base: Link) -> NDArray[np.float64]:
        found = errors(with_logs(base, logs))
        return np.concatenate([found, pulls * (logs - centre)])

    def fit(base: Link, logs: NDArray[np.float64]) -> NDArray[np.float64]:
        solved = least_squares(
            residuals,
            logs,
            args=(base,),
            bounds=(np.log(1e-4), upper),
            loss="soft_l1",
            f_scale=0.05,
            max_nfev=60,
        )
        return np.asarray(solved.x)

    logs = fit(link, start)
    for _ in range(2 if slots else 0):
        here = with_logs(link, logs)
        for path in slots:
            scale = to_si(1, figures[path].unit)
            likely = max(near.get(path, figures[path].value) * scale, _SLOTS[0])
            trials = [_with_values(link, {path: slot / scale}) for slot in _SLOTS]
            # Where no measurement tells a protocol's reach, it ends where that of the class it is like does.
            costs = [
                _soft(np.append(errors(_with_values(here, {path: slot / scale})), _PULL * log(slot / likely)))
                for slot in _SLOTS
            ]
            link = trials[int(np.argmin(costs))]
            here = _with_values(here, {path: figures_of(link)[path].value})
        logs = fit(link, logs)
    # What a fit has once made too slow to be chosen has no say any more. The short protocols begin again where those of
    # the class it is like are, and where the library's own constants have them, and the best end is kept.
    short = [".ll" in path for path in smooth]
    vendor = _farthest(link, known)
    own_constants = np.log([max(vendor.get(path, figures[path].value), 1e-3) for path in smooth])
    ends = [logs]
    for begin in (centre, own_constants):
        ends.append(fit(link, np.where(short, np.minimum(begin, upper - 1e-6), logs)))
    logs = min(ends, key=lambda found: _soft(residuals(found, link)))
    # Three digits are more than the measurements hold, and a profile that people can read.
    fitted = with_logs(link, np.log([float(f"{value:.3g}") for value in np.exp(logs)]))
    off = np.abs(np.expm1(errors(fitted)))
    return Calibration(
        link=fitted,
        points=len(measured),
        median_error=float(np.median(off)),
        p90_error=float(np.quantile(off, 0.9)),
    )


def calibrate_all(sweeps: Iterable[Sweep], names: Iterable[str] | None = None) -> dict[str, Link]:
    """Fit every link class, each after the class it is like and scale-up classes first.

    A class that pools others is fitted to the sweeps of all of them.

    A class that no sweep runs over takes the figures that would have been fitted from the class it is like; figures
    whose source says ``as X by class`` follow class X.

    Parameters
    ----------
    sweeps : iterable of Sweep
        Measurements.
    names : iterable of str, optional
        Classes to fit again; the others stay as they are in the catalog. All by default.
    """
    measured = list(sweeps)
    again = set(list_links() if names is None else names)
    classes = {name: load_link(name) for name in list_links()}
    for name in sorted(classes, key=lambda name: (classes[name].scope != "scale-up", _depth(classes, name))):
        link = classes[name]
        figures = figures_of(link)
        fitted = [path for path, figure in figures.items() if figure.source.startswith(FIT)]
        if fitted and name in again:
            near_values = _near(link, classes)
            link = _with_values(link, {path: near_values[path] for path in fitted if path in near_values})
            if any(sweep.fitted and _view(one, sweep, classes) for sweep in measured for one in _family(link, classes)):
                link = calibrate(link, measured, classes=classes).link
        classes[name] = _followed(link, classes)
    # What follows a class that was fitted later follows it now.
    return {name: _followed(link, classes) for name, link in classes.items()}


def predict(sweep: Sweep, classes: Mapping[str, Link] | None = None) -> NDArray[np.float64]:
    """Seconds for every point of a sweep, with the link classes of the catalog or others."""
    import numpy as np

    view = fabric(sweep.cluster, sweep.group)
    return _times(sweep, _with_classes(view, classes or {}), np.asarray(sweep.sizes_bytes))


def _undisturbed(sweep: Sweep) -> Sweep:
    """The sweep without the points that took a good deal longer than a larger message on the same machine did."""
    least = float("inf")
    kept = list[tuple[float, float]]()
    for size, time in sorted(zip(sweep.sizes_bytes, sweep.times_s, strict=True), reverse=True):
        least = min(least, time)
        if time <= _DISTURBED * least:
            kept.append((size, time))
    sizes, times = zip(*reversed(kept), strict=True)
    return replace(sweep, sizes_bytes=sizes, times_s=times)


def _times(sweep: Sweep, view: Fabric, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    times = fastest(choices(sweep.operation, view, sweep.algorithm), sizes)
    return np.maximum(times, posting_s(sweep.operation, view))


def _soft(errors: NDArray[np.float64]) -> float:
    import numpy as np

    return float(np.sum(np.sqrt(1 + (errors / 0.05) ** 2) - 1))


def _depth(classes: Mapping[str, Link], name: str) -> int:
    """How far a class is from one that is like no other."""
    like = classes[name].like
    return 0 if like is None else 1 + _depth(classes, like)


def _in_unit(figure: Figure, near: Figure) -> float:
    """The value of ``near`` in the unit of ``figure``."""
    return near.si / to_si(1, figure.unit)


def _family(link: Link, classes: Mapping[str, Link]) -> list[Link]:
    """The classes to whose measurements a class is fitted: itself, or those that are like it."""
    if not link.pools:
        return [link]
    known = {name: classes.get(name) or load_link(name) for name in list_links()}
    family, found = {link.name}, list[Link]()
    for name in sorted(known, key=lambda name: _depth(known, name)):
        if known[name].like in family:
            family.add(name)
            found.append(known[name])
    return [one for one in found if not one.pools]


def _like(link: Link, trial: Link) -> Link:
    """The class with the figures of another one, where both have them."""
    if link.name == trial.name:
        return trial
    parts = {}
    for name in link.__struct_fields__:
        own, other = getattr(link, name), getattr(trial, name)
        if name == "tuning":  # of a generation of devices, which the others do not share
            continue
        if isinstance(own, msgspec.Struct) and type(own) is type(other):
            parts[name] = _part_like(own, other)
    return msgspec.structs.replace(link, **parts)


@lru_cache(maxsize=4096)
def _part_like(own: Part, other: Part) -> Part:
    """A part of a class with the figures of another one, in its own units, where both have them."""
    figures, near = figures_of(own), figures_of(other)
    for path, figure in figures.items():
        if path in near:
            changed = msgspec.structs.replace(figure, value=_in_unit(figure, near[path]))
            own = _with_figure(own, path.split("."), changed)
    return own


def _near(link: Link, classes: Mapping[str, Link]) -> dict[str, float]:
    """Figures of the class that this one is like, in its own units, by key path; of its rings for unknown pairs.

    A figure that the other class takes from a third one may come from this one in the end and says nothing about it:
    what that class is like in its turn stands in.
    """
    if link.like is None:
        return {}
    other = classes.get(link.like) or load_link(link.like)
    farther = {} if other.name == link.name else _near(other, classes)  # a fit to one machine stays near its class
    figures, others = figures_of(link), figures_of(other)
    found = {}
    for path, (value, near) in _kin(link, other).items():
        match = _BY_CLASS.match(near.source)
        there = path if path in others else path.replace("pair.", "ring.")
        if match and match[1] != other.name and there in farther:
            found[path] = farther[there] * to_si(1, near.unit) / to_si(1, figures[path].unit)
        else:
            found[path] = value
    return found


def _farthest(link: Link, classes: Mapping[str, Link]) -> dict[str, float]:
    """Figures of the class at the end of the chain of likenesses, in the units of this one, by key path."""
    last = link
    while last.like is not None:
        near = classes.get(last.like)
        # A fit to one machine has the class itself stand in for what it is like.
        last = load_link(last.like) if near is None or near.name == last.name else near
    return {path: value for path, (value, _) in _kin(link, last).items()}


def _kin(link: Link, other: Link) -> dict[str, tuple[float, Figure]]:
    """Figures of another class by the key paths of this one and in its units, of its rings for unknown pairs."""
    figures, there = figures_of(link), figures_of(other)
    kin = {path: there.get(path) or there.get(path.replace("pair.", "ring.")) for path in figures}
    return {path: (_in_unit(figures[path], near), near) for path, near in kin.items() if near is not None}


def _own_path(path: str) -> str:
    """Which figure of the same class stands in: of its all-to-all for send and receive, of its rings for the others."""
    part, _, rest = path.partition(".")
    return f"all_to_all.{rest}" if part == "p2p" else f"ring.{rest}"


def _own_kin(link: Link) -> dict[str, str]:
    """Figures that a class takes from others of its own: their key paths and those of the others."""
    figures = figures_of(link)
    kin = {
        path: _own_path(path)
        for path, figure in figures.items()
        if (match := _BY_CLASS.match(figure.source)) and match[1] == link.name
    }
    return {path: own for path, own in kin.items() if own in figures and figures[own].unit == figures[path].unit}


def _followed(link: Link, classes: Mapping[str, Link]) -> Link:
    """The class with the figures that its sources take from another class, or from others of its own."""
    if link.like is None:
        return link
    # What others lend first: what follows a figure of its own may follow one that is lent.
    for own in (False, True):
        values: dict[str, float] = {}
        for path, figure in figures_of(link).items():
            match = _BY_CLASS.match(figure.source)
            if match is None or match[1] not in classes or own != (match[1] == link.name):
                continue
            near = figures_of(link if own else classes[match[1]])
            there = path if path in near and not own else _own_path(path)
            if there in near:
                values[path] = _in_unit(figure, near[there])
        link = _with_values(link, values)
    return link


def _view(link: Link, sweep: Sweep, classes: Mapping[str, Link]) -> Fabric | None:
    """The fabric of a sweep that this link class decides, or None."""
    view = _with_classes(fabric(sweep.cluster, sweep.group), classes)
    decides = view.up.name if view.out is None else view.out.name
    return view if decides == link.name and choices(sweep.operation, view, sweep.algorithm) else None


def _with_classes(view: Fabric, classes: Mapping[str, Link]) -> Fabric:
    out = None if view.out is None else classes.get(view.out.name, view.out)
    return replace(view, up=classes.get(view.up.name, view.up), out=out)


def with_figures(profile: Link, figures: Mapping[str, Figure]) -> Link:
    """The profile with other figures at some key paths such as ``ring.ll.step``."""
    changed = profile
    for path, figure in figures.items():
        changed = _with_figure(changed, path.split("."), figure)
    return changed


def _with_values(profile: Link, values: Mapping[str, float]) -> Link:
    """The profile with other values at some key paths, in the units they have."""
    figures = figures_of(profile)
    return with_figures(
        profile, {path: msgspec.structs.replace(figures[path], value=value) for path, value in values.items()}
    )


def _with_figure(part: Part, keys: Sequence[str], figure: Figure) -> Part:
    inner = figure if len(keys) == 1 else _with_figure(getattr(part, keys[0]), keys[1:], figure)
    return msgspec.structs.replace(part, **{keys[0]: inner})
