"""Pictures, where they are asked for: sweeps of collectives, and where the time and the memory of a plan go.

Pictures come back as bytes in the format asked for; matplotlib is loaded here and only here, and needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simllm.hardware import Cluster
    from simllm.network import CollectiveCost, Group
    from simllm.training import Estimate

__all__ = ["plot_collectives", "plot_estimate"]


def plot_collectives(cluster: Cluster, group: Group, costs: Sequence[CollectiveCost], picture: str) -> bytes:
    """Time and bus bandwidth of a collective over its size.

    Parameters
    ----------
    cluster : Cluster
    group : Group
    costs : sequence of CollectiveCost
        By rising size.
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    figure, (left, right) = _figure()
    sizes = [cost.size_bytes for cost in costs]
    left.loglog(sizes, [cost.time_s * 1e6 for cost in costs], marker="o", markersize=3)
    left.set_ylabel("time (us)")
    right.plot(sizes, [cost.busbw / 1e9 for cost in costs], color="0.8", zorder=0)
    for algorithm in dict.fromkeys(cost.algorithm for cost in costs):
        points = [(cost.size_bytes, cost.busbw / 1e9) for cost in costs if cost.algorithm == algorithm]
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=algorithm)
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_ylabel("bus bandwidth (GB/s)")
    right.legend(title="algorithm", frameon=False)
    for axes in (left, right):
        axes.set_xlabel("size (bytes)")
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"{costs[-1].operation}, {group.size} ranks (stride {group.stride}) of {cluster.name}")
    return _bytes(figure, picture)


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
    from matplotlib.ticker import MaxNLocator

    from simllm.report.estimates import MEMORY

    ranks = [stage.rank for stage in answer.stages]
    floor = [0.0] * len(ranks)
    for kind, words in MEMORY.items():
        heights = [stage.by_kind[kind] / 2**30 for stage in answer.stages]
        if any(heights):
            axes.bar(ranks, heights, bottom=floor, label=words)
            floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.axhline(answer.usable_memory_bytes / 2**30, color="black", linestyle="--", label="usable")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
