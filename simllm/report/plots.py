"""Pictures, where they are asked for: where the time and the memory of a plan go.

Pictures come back as bytes in the format asked for; matplotlib is loaded here and only here, and needs no display.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simllm.training import Estimate

__all__ = ["plot_estimate"]


def plot_estimate(answer: Estimate, picture: str) -> bytes:
    """Seconds by cause, and memory of each pipeline rank by kind against what is usable.

    Parameters
    ----------
    answer : Estimate
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    from simllm.planner.reasons import CAUSES

    figure, (left, right) = _figure()
    causes = sorted(((s, CAUSES[name]) for name, s in answer.time.by_cause.items() if s > 0))
    bars = left.barh([name for _, name in causes], [s for s, _ in causes])
    left.bar_label(bars, [f"{s / answer.step_time_s:.1%}" for s, _ in causes], padding=3)
    left.margins(x=0.2)
    left.set_xlabel("seconds of a step")
    _memory_bars(answer, right)
    figure.suptitle(f"{answer.model.name} on {answer.cluster.num_gpus} GPUs of {answer.cluster.name}: {answer.plan}")
    return _bytes(figure, picture)


def _memory_bars(answer: Estimate, axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    from simllm.report.estimates import MEMORY

    ranks = [stage.rank for stage in answer.stages]
    floor = [0.0] * len(ranks)
    for kind, words in MEMORY.items():
        heights = [stage.by_kind[kind] / 2**30 for stage in answer.stages]
        if any(heights):
            axes.bar(ranks, heights, bottom=floor, label=words)
            floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.axhline(answer.usable_memory_bytes / 2**30, color="black", linestyle="--", label="usable")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True) if len(ranks) > 1 else FixedLocator(ranks))
    axes.set_xlim(-0.7, len(ranks) - 0.3)
    axes.set_xlabel("pipeline rank")
    axes.set_ylabel("peak memory (GiB)")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _figure() -> tuple[Figure, tuple[Axes, Axes]]:
    # Without pyplot: whoever draws in a notebook keeps the backend and the figures that are open there.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    return figure, (axes[0], axes[1])


def _bytes(figure: Figure, picture: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=150)
    return buffer.getvalue()
