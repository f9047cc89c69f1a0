"""Prices of collectives as tables and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import RenderableType
from rich.text import Text

from simllm.hardware import Cluster
from simllm.hardware.links import Curve, Link, SwitchCurve
from simllm.network import CollectiveCost, Group, bus_factor
from simllm.network.fabric import fabric
from simllm.network.price import choices
from simllm.report.text import facts, heading, notes, paragraph, table
from simllm.units import format_bytes, format_duration, format_rate
from simllm.validation.scoring import percentile

if TYPE_CHECKING:
    from simllm.validation.collective_rows import Series
    from simllm.validation.link_fit import LinkFit, Measured

__all__ = [
    "calibration_dict",
    "calibration_report",
    "collective_dict",
    "collective_report",
    "doubling_sizes",
    "wire_times_s",
]

#: Sizes of a measured and a priced point that count as the same.
_SAME_SIZE = 0.01


def doubling_sizes(first: int, last: int) -> list[int]:
    """Sizes from the first to the last, each twice the one before, as nccl-tests steps with ``-f 2``.

    >>> doubling_sizes(1024, 5000)
    [1024, 2048, 4096, 5000]
    """
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= 2
    return [*sizes, last]


def wire_times_s(cluster: Cluster, group: Group, costs: Sequence[CollectiveCost]) -> list[float]:
    """The wire limit: seconds that the chosen algorithms need if their links run at full rate and nothing else counts.

    Examples
    --------
    A ring of 8 sends 7/8 of the buffer of an all-gather over the 450 GB/s of NVLink 4.

    >>> from simllm.hardware import load_cluster
    >>> from simllm.network import price
    >>> cluster, group = load_cluster("dgx-h100", 8), Group(size=8)
    >>> wire = wire_times_s(cluster, group, [price("all_gather", 450e9, cluster, group)])
    >>> round(wire[0], 3)
    0.875
    """
    view = fabric(cluster, group)
    ideal = replace(view, up=_ideal(view.up), out=None if view.out is None else _ideal(view.out))
    slopes: dict[tuple[str, str], float] = {}
    for operation, algorithm in {(cost.operation, cost.algorithm) for cost in costs if cost.algorithm != "none"}:
        offered = [terms for terms in choices(operation, ideal) if terms.algorithm == algorithm]
        forced = offered or choices(operation, ideal, algorithm)
        slopes[operation, algorithm] = min(terms.s_per_byte for terms in forced)
    return [slopes.get((cost.operation, cost.algorithm), 0.0) * cost.size_bytes for cost in costs]


def _ideal(link: Link) -> Link:
    """A link class whose messages reach the full rate of the wire, are not copied and need no channels."""
    changes: dict[str, msgspec.Struct] = {}
    for name in link.__struct_fields__:
        curve = getattr(link, name)
        if isinstance(curve, Curve | SwitchCurve):
            whole = msgspec.structs.replace(curve.efficiency, value=1.0)
            copies = {"copy": None, "channels": None, "channel": None} if isinstance(curve, Curve) else {}
            changes[name] = msgspec.structs.replace(curve, efficiency=whole, **copies)
    return msgspec.structs.replace(link, **changes)


def _cost_dict(cost: CollectiveCost, wire_s: float) -> dict[str, Any]:
    factor = bus_factor(cost.operation, cost.group_size)
    return {
        "size_bytes": cost.size_bytes,
        "time_s": cost.time_s,
        "latency_s": cost.latency_s,
        "bandwidth_s": cost.bandwidth_s,
        "algbw_bytes_per_s": cost.algbw,
        "busbw_bytes_per_s": cost.busbw,
        "algorithm": cost.algorithm,
        "protocol": cost.protocol,
        "bottleneck": cost.bottleneck,
        "bottleneck_bandwidth_bytes_per_s": cost.bottleneck_bandwidth,
        "wire_limit_busbw_bytes_per_s": cost.size_bytes / wire_s * factor if wire_s else None,
        "efficiency": wire_s / cost.time_s if wire_s else None,
        "scaleup_bytes_per_gpu": cost.bytes_scaleup,
        "scaleout_bytes_per_gpu": cost.bytes_scaleout,
    }


def collective_dict(
    cluster: Cluster, group: Group, costs: Sequence[CollectiveCost], sweep: bool, measured: Sequence[Series] = ()
) -> dict[str, Any]:
    """The price of the last size as plain data, with ``sweep`` those of all sizes below it, and what was measured."""
    wire = wire_times_s(cluster, group, costs)
    document = {
        "operation": costs[-1].operation,
        "cluster": cluster.name,
        "gpus": cluster.num_gpus,
        "ranks": group.size,
        "stride": group.stride,
        **_cost_dict(costs[-1], wire[-1]),
    }
    if sweep:
        document["sweep"] = [_cost_dict(cost, wire_s) for cost, wire_s in zip(costs, wire, strict=True)]
    if measured:
        document["measured"] = [
            {
                "system": series.label,
                "sweep": series.sweep,
                "points": [
                    {"size_bytes": size, "time_s": seconds}
                    for size, seconds in zip(series.sizes_bytes, series.times_s, strict=True)
                ],
            }
            for series in measured
        ]
    return document


def collective_report(
    cluster: Cluster, group: Group, costs: Sequence[CollectiveCost], measured: Sequence[Series] | None = None
) -> list[RenderableType]:
    """One price in full, or a table of several; ``measured`` are the sweeps beside it, None if none were asked for."""
    cost = costs[-1]
    stride = f" with stride {group.stride}" if group.stride > 1 else ""
    nodes = f"{cluster.num_nodes} node{'s' if cluster.num_nodes > 1 else ''}"
    where = f"{group.size} ranks{stride} of {cluster.num_gpus} GPUs, {cluster.name} ({nodes})"
    title = heading(cost.operation, where if len(costs) > 1 else f"{format_bytes(cost.size_bytes, 4)}, {where}")
    wire = wire_times_s(cluster, group, costs)
    if len(costs) > 1:
        return [title, Text(), _sweep_table(costs, wire, measured or ()), *_sources(measured)]
    spent = f"{format_duration(cost.latency_s)} latency + {format_duration(cost.bandwidth_s)} transfer"
    sent = f"{format_bytes(cost.bytes_scaleup)} inside the domain, {format_bytes(cost.bytes_scaleout)} between domains"
    rows = {
        "time": f"{format_duration(cost.time_s)} = {spent}",
        "algbw": format_rate(cost.algbw),
        "busbw": format_rate(cost.busbw),
        "algorithm": f"{cost.algorithm}, protocol {cost.protocol}",
        "limited by": f"{cost.bottleneck}, {format_rate(cost.bottleneck_bandwidth)} each way",
        "sent by a GPU": sent,
    }
    if wire[-1]:
        limit = cost.size_bytes / wire[-1] * bus_factor(cost.operation, cost.group_size)
        share = f"{wire[-1] / cost.time_s:.0%}"
        rows["efficiency"] = f"{share} of the wire limit, a busbw of {format_rate(limit)}"
    return [title, Text(), facts(rows)]


def _sweep_table(costs: Sequence[CollectiveCost], wire: Sequence[float], measured: Sequence[Series]) -> RenderableType:
    columns = ["size", "time", "algbw", "busbw", "of wire", "algorithm", "protocol", "limited by"]
    if measured:
        columns[4:4] = ["measured", "error"]
    rows = []
    for cost, wire_s in zip(costs, wire, strict=True):
        cells = [
            format_bytes(cost.size_bytes, 4),
            format_duration(cost.time_s),
            format_rate(cost.algbw),
            format_rate(cost.busbw),
            f"{wire_s / cost.time_s:.0%}" if wire_s else "",
            cost.algorithm,
            cost.protocol,
            cost.bottleneck,
        ]
        if measured:
            seconds = _measured_at(measured, cost.size_bytes)
            factor = bus_factor(cost.operation, cost.group_size)
            cells[4:4] = (
                ["", ""]
                if seconds is None
                else [format_rate(cost.size_bytes / seconds * factor), f"{cost.time_s / seconds - 1:+.0%}"]
            )
        rows.append(cells)
    return table(columns, rows, left=("algorithm", "protocol", "limited by"), wrap=("limited by",))


def _measured_at(measured: Sequence[Series], size: float) -> float | None:
    """Median of what was measured at a size."""
    found = [
        seconds
        for series in measured
        for known, seconds in zip(series.sizes_bytes, series.times_s, strict=True)
        if abs(known / size - 1) <= _SAME_SIZE
    ]
    return median(found) if found else None


def _sources(measured: Sequence[Series] | None) -> list[RenderableType]:
    if measured is None:
        return []
    if not measured:
        return [Text(), paragraph("Nothing in the file was measured on such a group.")]
    counts: dict[str, int] = {}
    for series in measured:
        counts[series.label] = counts.get(series.label, 0) + len(series.sizes_bytes)
    return [
        Text(),
        paragraph("measured: busbw at this size, the median of the systems below; error: of the predicted time."),
        *notes("Measured on", [f"{label}, {number} points" for label, number in counts.items()]),
    ]


def calibration_dict(fits: Sequence[LinkFit], measured: Measured) -> dict[str, Any]:
    """Fitted link classes as plain data."""
    return {
        "links": [fit.to_dict() for fit in fits],
        "left_out": dict(measured.left_out),
        "assumptions": list(measured.assumptions),
    }


def calibration_report(fits: Sequence[LinkFit], measured: Measured, written: Mapping[str, str]) -> list[RenderableType]:
    """Fitted figures and what the fit leaves over.

    Parameters
    ----------
    fits : sequence of LinkFit
    measured : Measured
    written : mapping of str to str
        File of each link class.
    """
    parts: list[RenderableType] = []
    for fit in fits:
        data = fit.to_dict()
        errors = f"median error {data['median_absolute_percentage_error']:.1f}%, "
        errors += f"p90 {data['p90_absolute_percentage_error']:.1f}%"
        parts += [Text()] if parts else []
        parts += [heading(fit.link.name, f"{fit.points} points, {errors}; written to {written[fit.link.name]}"), Text()]
        columns = ("figure", "before", "fitted", "unit")
        figures = [
            (path, f"{figure['before']:.4g}", f"{figure['fitted']:.4g}", figure["unit"])
            for path, figure in data["figures"].items()
        ]
        parts += [table(columns, figures, left=("figure", "unit")), Text(), _residuals(fit)]
        parts += [Text(), _worst(fit)]
    left_out = [(str(number), reason) for reason, number in measured.left_out.items()]
    if left_out:
        title = "left out because"
        parts += [Text(), table(("rows", title), left_out[:12], left=(title,), wrap=(title,))]
        more = len(left_out) - 12
        parts += [paragraph(f"and {more} more reasons; --json names all")] if more > 0 else []
    return parts + notes("Assumptions", measured.assumptions[:20])


def _residuals(fit: LinkFit) -> RenderableType:
    """Errors of each sweep, before and after."""
    columns = ("residuals of", "system", "ranks", "sizes", "median before", "median", "p90", "worst")
    rows = []
    for found in fit.sweeps:
        sweep = found.sweep
        before = [abs(b / m - 1) for b, m in zip(found.before_s, sweep.times_s, strict=True)]
        after = sorted(abs(error) for error in found.errors)
        rows.append(
            (
                sweep.operation,
                sweep.system,
                str(sweep.group.size),
                str(len(after)),
                f"{median(before):.1%}",
                f"{median(after):.1%}",
                f"{percentile(after, 0.9):.1%}",
                f"{after[-1]:.1%}",
            )
        )
    return table(columns, rows, left=columns[:2], wrap=columns[:2])


def _worst(fit: LinkFit, most: int = 8) -> RenderableType:
    """The points that the fit misses by most."""
    points = [(abs(error), found, index) for found in fit.sweeps for index, error in enumerate(found.errors)]
    points.sort(key=lambda point: -point[0])
    rows = []
    for _, found, index in points[:most]:
        sweep, size = found.sweep, found.sweep.sizes_bytes[index]
        rows.append(
            (
                sweep.operation,
                str(sweep.group.size),
                format_bytes(size, 4),
                format_duration(sweep.times_s[index]),
                format_duration(found.fitted_s[index]),
                format_rate(size / sweep.times_s[index] * found.bus_factor),
                format_rate(size / found.fitted_s[index] * found.bus_factor),
                f"{found.errors[index]:+.1%}",
            )
        )
    columns = ("worst points", "ranks", "size", "measured", "fitted", "measured busbw", "fitted busbw", "error")
    return table(columns, rows, left=columns[:1])
