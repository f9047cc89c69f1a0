"""Pictures of kernels: predicted against measured times, and errors over the size of the work.

Pictures come back as bytes in the format asked for; matplotlib is loaded in the functions and needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from simllm.kernels.calibrate import Calibration
from simllm.validation.kernels import KernelReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_kernel_calibration", "plot_kernel_validation"]

#: Errors beyond this are drawn at the edge.
_MOST_ERROR = 60.0


def plot_kernel_validation(report: KernelReport, picture: str) -> bytes:
    """Predicted over measured times by kind of kernel, and the errors over the measured time.

    Parameters
    ----------
    report : KernelReport
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        predicted = row.left_out_time_s if report.has_left_out else row.predicted_time_s
        if row.measured_time_s is not None and predicted is not None:
            points.setdefault(row.kind, []).append((row.measured_time_s, predicted))
    seen = "shape left out of the fit" if report.has_left_out else "shipped curves"
    return _draw(points, f"predicted ({seen})", picture)


def plot_kernel_calibration(fits: Calibration, picture: str) -> bytes:
    """Fitted times, and those with the shape left out where they are known, over measured times.

    Parameters
    ----------
    fits : Calibration
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    points = {
        "in the fit": [(fits.measured_s[index], seconds) for index, seconds in fits.fitted_s.items()],
        "shape left out": [(fits.measured_s[index], seconds) for index, seconds in fits.left_out_s.items()],
    }
    return _draw({name: found for name, found in points.items() if found}, "fitted", picture)


def _draw(points: dict[str, list[tuple[float, float]]], what: str, picture: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(points.items()):
        measured = [pair[0] * 1e3 for pair in found]
        style = {"color": f"C{number}", "marker": "ox+s"[number % 4], "s": 14, "alpha": 0.5, "linewidths": 0.8}
        left.scatter(measured, [pair[1] * 1e3 for pair in found], label=f"{name} ({len(found)})", **style)
        errors = [100 * (pair[1] / pair[0] - 1) for pair in found]
        right.scatter(measured, [max(-_MOST_ERROR, min(_MOST_ERROR, error)) for error in errors], **style)
    every = [value * 1e3 for found in points.values() for pair in found for value in pair]
    _axes(left, right, what, every)
    stream = io.BytesIO()
    figure.savefig(stream, format=picture, dpi=120)
    return stream.getvalue()


def _axes(left: Axes, right: Axes, what: str, every: Sequence[float]) -> None:
    left.set_xscale("log")
    left.set_yscale("log")
    right.set_xscale("log")
    if every:
        ends = (min(every), max(every))
        left.plot(ends, ends, color="0.4", linewidth=0.8, zorder=0)
    left.set_xlabel("measured, ms")
    left.set_ylabel(f"{what}, ms")
    left.legend(fontsize="small")
    right.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    right.set_ylim(-_MOST_ERROR * 1.05, _MOST_ERROR * 1.05)
    right.set_xlabel("measured, ms")
    right.set_ylabel(f"error in % (drawn at the edge beyond {_MOST_ERROR:.0f} %)")
