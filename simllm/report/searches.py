"""What a search says beside its best plans: given plans in rank, the Pareto front, fixes, what to change."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.text import Text

from simllm.planner import PlanSearch
from simllm.report.text import heading, notes, table
from simllm.units import format_bytes, format_duration

__all__ = ["changes", "compared", "fixes", "front"]

#: Plans of a front, and changes, that are shown; all are in the JSON document.
_SHOWN = 8


def compared(search: PlanSearch) -> list[RenderableType]:
    """The plans that were to be compared, with their rank and why."""
    parts: list[RenderableType] = []
    for comparison in search.comparisons:
        answer = comparison.answer
        step = f"step {format_duration(answer.step_time_s)}, MFU {answer.mfu:.1%}"
        line = f"{step}, {format_bytes(answer.peak_memory_bytes)} at the peak"
        parts += notes(f"Compared: {answer.plan}", (line, *comparison.why))
    return parts


def front(search: PlanSearch) -> list[RenderableType]:
    """Some plans of the Pareto front, from the fastest to the one that leaves most memory or takes fewest GPUs.

    Plans that take more than twice the least GPU time are left to the JSON document.
    """
    if len(search.front) < 2:
        return []
    least = min(point.gpu_seconds for point in search.front)
    points = [point for point in search.front if point.gpu_seconds <= 2 * least]
    shown = points if len(points) <= _SHOWN else [points[i * (len(points) - 1) // (_SHOWN - 1)] for i in range(_SHOWN)]
    rows = [
        (
            str(point.plan.num_gpus),
            format_duration(point.step_time_s),
            f"{point.gpu_seconds / 3600:,.3g}",
            format_bytes(point.cluster.accelerator.memory_bytes - point.peak_bytes),
            str(point.plan),
        )
        for point in shown
    ]
    number = f"{len(search.front)} plans that none beats in time, GPUs, GPU time and free memory at once"
    columns = ("GPUs", "step", "GPU-hours", "free", "plan")
    return [Text(), heading("Pareto front", number), table(columns, rows, left=("plan",), wrap=("plan",))]


def fixes(search: PlanSearch) -> list[RenderableType]:
    """What would make the plans fit that do not; by reason in the JSON document."""
    found: Counter[str] = Counter()
    for changes in search.fixes.values():
        found.update(changes)
    if not found:
        return []
    rows = [(change, f"{count:,}") for change, count in found.most_common(_SHOWN)]
    rest = sum(found.values()) - sum(count for _, count in found.most_common(_SHOWN))
    if rest:
        rows.append(("other changes", f"{rest:,}"))
    columns = ("nearest change for those out of memory", "combinations")
    return [Text(), table(columns, rows, left=columns[:1])]


def changes(search: PlanSearch) -> list[RenderableType]:
    """Where no plan is feasible: what to change, and the best plan then."""
    lines = [
        f"{text}: {answer.plan}, step {format_duration(answer.step_time_s)}, "
        f"{format_bytes(answer.peak_memory_bytes)} at the peak"
        for text, answer in search.changes
    ]
    return notes("What would help", lines)
