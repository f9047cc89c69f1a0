"""Fit the figures of a link class to published collectives.

Only collectives are fitted, never training runs. A fit moves the figures that no datasheet gives so that the
logarithm of predicted over measured time is small in the sense of a soft absolute value: a point that is twice too slow
weighs as much as one twice too fast, and a congested point does not drag the others along.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from simllm.errors import InputError
from simllm.hardware.cluster import Cluster, make_cluster
from simllm.hardware.links import Link
from simllm.hardware.profiles import figures_of
from simllm.network.fabric import Fabric, fabric
from simllm.network.group import Group
from simllm.network.price import choices, fastest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FIT", "Calibration", "Sweep", "calibrate", "read_sweeps"]

#: How the source of a figure begins that `calibrate` fitted.
FIT = "fit of simllm.network.calibrate"

#: nccl-tests' names of operations.
_OPERATIONS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send_recv",
    "p2p": "send_recv",
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Measured times of one collective over sizes, on a cluster that is described.

    Parameters
    ----------
    name : str
        Label of the run.
    system : str
        What the source says about the machine.
    operation : str
        One of `simllm.network.OPERATIONS`.
    cluster : Cluster
        The machine.
    group : Group
        The ranks.
    algorithm : str or None
        Algorithm the run forced.
    sizes_bytes, times_s : tuple of float
        The points.
    fitted : bool
        Whether the sweep says something about links; false where a launch or a missing peer path hides them.
    """

    name: str
    system: str
    operation: str
    cluster: Cluster
    group: Group
    algorithm: str | None
    sizes_bytes: tuple[float, ...]
    times_s: tuple[float, ...]
    fitted: bool


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


def read_sweeps(points: Path, systems: Path) -> tuple[list[Sweep], dict[str, int]]:
    """Sweeps of a table of published points, and how many rows were left out for which reason.

    Parameters
    ----------
    points : Path
        CSV with the columns ``sweep, usable, system, n_nodes, n_gpus, collective, algorithm, message_bytes, time_us``.
    systems : Path
        CSV that describes each ``system``: ``accelerator, gpus_per_node, domain_gpus, scaleout_link,
        scaleout_GBps_per_node``, and ``fit_up_to_gpus``, the largest group that tells about links (empty: any).

    Returns
    -------
    list of Sweep, dict
        The sweeps, and the rows left out by reason.
    """
    described = {row["system"]: row for row in csv.DictReader(systems.open(encoding="utf-8", newline=""))}
    rows: dict[str, list[dict[str, str]]] = {}
    refused: dict[str, int] = {}
    for row in csv.DictReader(points.open(encoding="utf-8", newline="")):
        reason = _refusal(row, described.get(row["system"]))
        if reason:
            refused[reason] = refused.get(reason, 0) + 1
        else:
            rows.setdefault(f"{row['sweep']}/{row['n_nodes']}/{row['algorithm']}", []).append(row)
    return [_sweep(name, members, described[members[0]["system"]]) for name, members in rows.items()], refused


def _refusal(row: dict[str, str], system: dict[str, str] | None) -> str:
    """Why a row cannot be scored; empty if it can."""
    if row["usable"] != "True" or not row["time_us"] or not row["message_bytes"]:
        return "no measured time and size"
    if row["collective"] not in _OPERATIONS:
        return f"{row['collective']} is not priced"
    if row["algorithm"] and row["algorithm"].lower() not in ("ring", "tree", "nvls", "nvlstree"):
        return f"{row['algorithm']} is not an algorithm of the library"
    if system is None or not system["accelerator"]:
        return "the system is not described"
    if not row["n_nodes"] or not row["n_gpus"]:
        return "the number of nodes or GPUs is not stated"
    if float(row["n_nodes"]) > 1 and not system["scaleout_link"]:
        return "the network is not stated"
    return ""


def _sweep(name: str, rows: list[dict[str, str]], system: dict[str, str]) -> Sweep:
    first = rows[0]
    nodes, ranks = int(float(first["n_nodes"])), int(float(first["n_gpus"]))
    per_node = int(system["gpus_per_node"])
    network = system["scaleout_GBps_per_node"]
    cluster = make_cluster(
        accelerator=system["accelerator"],
        num_gpus=nodes * per_node,
        gpus_per_node=per_node,
        domain_gpus=int(system["domain_gpus"]),
        scaleout_bandwidth_per_node=float(network) * 1e9 if network else None,
        scaleout_link=system["scaleout_link"] or None,
    )
    used = max(ranks // nodes, 1)
    stride = per_node // used if nodes > 1 else 1
    rows = sorted(rows, key=lambda row: float(row["message_bytes"]))
    forced = {"nvlstree": "nvls_tree"}.get(first["algorithm"].lower(), first["algorithm"].lower())
    return Sweep(
        name=name,
        system=first["system"],
        operation=_OPERATIONS[first["collective"]],
        cluster=cluster,
        group=Group(size=ranks, stride=stride),
        algorithm=forced or None,
        sizes_bytes=tuple(float(row["message_bytes"]) for row in rows),
        times_s=tuple(float(row["time_us"]) * 1e-6 for row in rows),
        # A broadcast's time depends on who waits for it; the ring's constants come from symmetric collectives.
        fitted=first["collective"] != "broadcast" and ranks <= int(system["fit_up_to_gpus"] or ranks),
    )


def calibrate(link: Link, sweeps: Iterable[Sweep], paths: Sequence[str] | None = None) -> Calibration:
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

    Returns
    -------
    Calibration
        The class with fitted figures and the errors that remain.
    """
    import numpy as np
    from scipy.optimize import least_squares

    used = [(sweep, view) for sweep in sweeps if sweep.fitted and (view := _view(link, sweep)) is not None]
    if not used:
        raise InputError(f"no sweep runs over {link.name}; give measurements of a system with such links")
    figures = figures_of(link)
    wanted = paths or [path for path, figure in figures.items() if figure.source.startswith(FIT)]
    start = np.log([max(figures[path].value, 1e-3) for path in wanted])
    upper = np.log([0.99 if figures[path].unit == "fraction" and "copy" not in path else 1e4 for path in wanted])
    measured = np.log(np.concatenate([sweep.times_s for sweep, _ in used]))
    arrays = [np.asarray(sweep.sizes_bytes) for sweep, _ in used]

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        trial = _with_figures(link, dict(zip(wanted, np.exp(logs), strict=True)))
        parts = [
            fastest(choices(sweep.operation, _replaced(view, trial), sweep.algorithm), sizes)
            for (sweep, view), sizes in zip(used, arrays, strict=True)
        ]
        return np.asarray(np.log(np.concatenate(parts)) - measured)

    fit = least_squares(
        residuals, np.minimum(start, upper - 1e-6), bounds=(np.log(1e-4), upper), loss="soft_l1", f_scale=0.05
    )
    # Three digits are more than the measurements hold, and a profile that people can read.
    values = [float(f"{value:.3g}") for value in np.exp(fit.x)]
    errors = np.abs(np.expm1(residuals(np.log(values))))
    return Calibration(
        link=_with_figures(link, dict(zip(wanted, values, strict=True))),
        points=len(measured),
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
    )


def _view(link: Link, sweep: Sweep) -> Fabric | None:
    """The fabric of a sweep that this link class decides, or None."""
    view = fabric(sweep.cluster, sweep.group)
    decides = view.up.name if view.out is None else view.out.name
    return view if decides == link.name and choices(sweep.operation, view, sweep.algorithm) else None


def _replaced(view: Fabric, link: Link) -> Fabric:
    return replace(view, up=link) if link.scope == "scale-up" else replace(view, out=link)


def _with_figures(profile: Link, values: dict[str, float]) -> Link:
    changes: dict[str, msgspec.Struct] = {}
    for path, value in values.items():
        part, name = path.split(".")
        curve = changes.get(part, getattr(profile, part))
        figure = msgspec.structs.replace(getattr(curve, name), value=value)
        changes[part] = msgspec.structs.replace(curve, **{name: figure})
    return msgspec.structs.replace(profile, **changes)
