"""Pictures of collectives: predicted sweeps beside what was measured, and what a calibration leaves over.

Pictures come back as bytes in the format asked for; matplotlib is loaded in the functions and needs no display.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from simllm.network import bus_factor
from simllm.report.collectives import wire_times_s
from simllm.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simllm.hardware import Cluster
    from simllm.network import CollectiveCost, Group
    from simllm.validation.collective_rows import Series
    from simllm.validation.link_fit import FittedSweep, LinkFit

__all__ = ["plot_collectives", "plot_residuals", "size_axis"]

#: Sweeps that a picture of residuals shows.
_MOST_PANELS = 12


def size_axis(axes: Axes) -> None:
    """Sizes in binary units on a logarithmic axis, a tick for every factor of 32."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2**n for n in range(0, 61, 5)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.tick_params(axis="x", labelrotation=45, labelsize="small")


def plot_collectives(
    cluster: Cluster, group: Group, costs: Sequence[CollectiveCost], picture: str, measured: Sequence[Series] = ()
) -> bytes:
    """Time and bus bandwidth of a collective over its size, the wire limit as a line, what was measured as points.

    Parameters
    ----------
    cluster : Cluster
    group : Group
    costs : sequence of CollectiveCost
        By rising size.
    picture : str
        ``png``, ``svg`` or ``pdf``.
    measured : sequence of Series
        Sweeps on such groups.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [cost.size_bytes for cost in costs]
    operation, factor = costs[-1].operation, bus_factor(costs[-1].operation, group.size)
    _wire_limit(cluster, group, costs, left, right)
    for axes, values in ((left, [c.time_s * 1e6 for c in costs]), (right, [c.busbw / 1e9 for c in costs])):
        axes.plot(sizes, values, color="0.75", zorder=1)
    for index, algorithm in enumerate(dict.fromkeys(cost.algorithm for cost in costs)):
        chosen = [cost for cost in costs if cost.algorithm == algorithm]
        style: dict[str, Any] = {"color": f"C{index}", "linestyle": "", "marker": "o", "markersize": 6.5, "zorder": 2}
        at = [cost.size_bytes for cost in chosen]
        left.plot(at, [cost.time_s * 1e6 for cost in chosen], **style)
        right.plot(at, [cost.busbw / 1e9 for cost in chosen], label=f"predicted, {algorithm}", **style)
    for index, (label, points) in enumerate(_by_label(measured).items()):
        style = {"color": "black", "linestyle": "", "marker": "x+1234v^s"[index % 9], "markersize": 4, "zorder": 3}
        at = [size for size, _ in points]
        left.plot(at, [seconds * 1e6 for _, seconds in points], **style)
        right.plot(
            at, [size / seconds * factor / 1e9 for size, seconds in points], label=f"measured, {_short(label)}", **style
        )
    left.set_yscale("log")
    left.set_ylim(bottom=min(cost.time_s for cost in costs) * 1e6 / 4)
    left.set_ylabel("time (us)")
    right.set_ylim(bottom=0)
    right.set_ylabel("bus bandwidth (GB/s)")
    _finish(figure, (left, right))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize="small"
    )
    stride = f", stride {group.stride}" if group.stride > 1 else ""
    nodes = f"{cluster.num_nodes} node{'s' if cluster.num_nodes > 1 else ''}"
    figure.suptitle(f"{operation}, {group.size} ranks{stride} of {cluster.name} ({nodes})")
    return _bytes(figure, picture)


def _wire_limit(cluster: Cluster, group: Group, costs: Sequence[CollectiveCost], left: Axes, right: Axes) -> None:
    """The limit of the chosen algorithm; it steps where another algorithm takes over."""
    wire = wire_times_s(cluster, group, costs)
    if not all(wire):
        return
    factor = bus_factor(costs[-1].operation, group.size)
    sizes = [cost.size_bytes for cost in costs]
    style: dict[str, Any] = {"color": "C3", "linestyle": "--", "linewidth": 1, "zorder": 0}
    left.plot(sizes, [seconds * 1e6 for seconds in wire], **style)
    limits = [size / seconds * factor / 1e9 for size, seconds in zip(sizes, wire, strict=True)]
    right.step(sizes, limits, where="mid", label="wire limit of the algorithm", **style)


def _by_label(measured: Sequence[Series]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for series in measured:
        found.setdefault(series.label, []).extend(zip(series.sizes_bytes, series.times_s, strict=True))
    return found


def _short(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _finish(figure: Figure, panels: Sequence[Axes]) -> None:
    for axes in panels:
        size_axis(axes)
        axes.set_xlabel("size")
        axes.grid(visible=True, alpha=0.3)


def plot_residuals(fits: Sequence[LinkFit], picture: str) -> bytes:
    """Measured and fitted bus bandwidth over size, a panel for each sweep.

    Parameters
    ----------
    fits : sequence of LinkFit
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    from matplotlib.figure import Figure

    sweeps = [(fit, found) for fit in fits for found in fit.sweeps]
    shown = sorted(sweeps, key=lambda pair: -len(pair[1].fitted_s))[:_MOST_PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(4.4 * columns, 7), 3.4 * rows + 0.8), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (fit, found) in zip(panels, shown, strict=False):
        _residual_panel(axes, fit, found)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    _finish(figure, panels[: len(shown)])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    rest = f"; the {len(shown)} longest of {len(sweeps)} sweeps" if len(sweeps) > len(shown) else ""
    title = f"Measured against fitted: {', '.join(fit.link.name for fit in fits)}{rest}"
    figure.suptitle("\n".join(textwrap.wrap(title, 30 * columns + 10)))
    return _bytes(figure, picture)


def _residual_panel(axes: Axes, fit: LinkFit, found: FittedSweep) -> None:
    sweep = found.sweep
    sizes = sweep.sizes_bytes

    def busbw(times: Sequence[float]) -> list[float]:
        return [size / seconds * found.bus_factor / 1e9 for size, seconds in zip(sizes, times, strict=True)]

    axes.plot(sizes, busbw(found.before_s), color="0.6", linestyle=":", label="the catalog's figures")
    axes.plot(sizes, busbw(found.fitted_s), color="C0", label="fitted")
    axes.plot(sizes, busbw(sweep.times_s), color="black", linestyle="", marker="x", markersize=4, label="measured")
    axes.set_yscale("log")
    axes.set_ylabel("bus bandwidth (GB/s)")
    error = median(abs(error) for error in found.errors)
    where = f"{sweep.group.size} ranks, {_short(sweep.system, 30)}"
    axes.set_title(f"{sweep.operation}, {where}: {error:.1%}", fontsize=8)


def _bytes(figure: Figure, picture: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=150)
    return buffer.getvalue()
