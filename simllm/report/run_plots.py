"""Published runs against predictions as a picture."""

from __future__ import annotations

import io
from collections import Counter
from statistics import median

from simllm.validation.run_fit import source_of
from simllm.validation.runs import ValidationReport

__all__ = ["plot_runs"]

_FEWEST = 3


def plot_runs(report: ValidationReport, picture: str) -> bytes:
    """Predicted over measured step time, and the spread of their ratio for each source.

    Parameters
    ----------
    report : ValidationReport
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    from matplotlib.figure import Figure

    known = [(source_of(row.source, row.gpu), o, row.gpu) for row in report.scored if (o := row.step_time)]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    devices = [name for name, _ in Counter(gpu for _, _, gpu in known).most_common(9)]
    for device in (*devices, None):
        points = [o for _, o, gpu in known if (gpu == device if device else gpu not in devices)]
        if points:
            left.loglog(
                [o.measured for o in points],
                [o.predicted for o in points],
                "o",
                ms=4,
                alpha=0.6,
                label=device or "others",
            )
    ends = (min(o.measured for _, o, _ in known), max(o.measured for _, o, _ in known))
    left.loglog(ends, ends, color="black", lw=1)
    left.set_xlabel("measured step time (s)")
    left.set_ylabel("predicted step time (s)")
    left.legend(frameon=False, fontsize="small")
    groups: dict[str, list[float]] = {}
    for name, o, _ in known:
        groups.setdefault(name, []).append(100 * (o.predicted / o.measured - 1))
    shown = sorted((name for name in groups if len(groups[name]) >= _FEWEST), key=lambda name: median(groups[name]))
    right.boxplot([groups[name] for name in shown], orientation="horizontal", widths=0.6, showfliers=True)
    right.set_yticks(range(1, len(shown) + 1), [f"{name} ({len(groups[name])})" for name in shown], fontsize="small")
    right.axvline(0, color="black", lw=1)
    right.set_xlabel("error of predicted step time (%)")
    right.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=130)
    return buffer.getvalue()
