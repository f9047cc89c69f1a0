"""What would help, to read: a tenth more of one thing at a time, with the same plan and with the best one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from simllm.planner.binding import resources
from simllm.planner.sensitivity import Change
from simllm.report.text import facts, heading, notes, table

__all__ = ["change_rows", "sensitivity_report"]


def change_rows(changes: Sequence[Change]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows: what was changed, and what it does to the throughput."""
    searched = any(change.best is not None for change in changes)
    columns = ("more of", "from", "to", "same plan", "per percent", *(("best plan",) if searched else ()))
    rows = []
    for change in changes:
        again, best = change.same_plan, change.best
        if again is None:
            same, share = "cannot run", ""
        else:
            same = f"{change.gain(again):+.1%}" + ("" if again.fits else ", too big")
            share = f"{change.elasticity:+.2f}"
        then = "none fits" if best is None else f"{change.gain(best):+.1%}" + ("" if _same(change) else " *")
        rows.append((change.what, change.before, change.after, same, share, *((then,) if searched else ())))
    return columns, rows


def _same(change: Change) -> bool:
    return change.same_plan is not None and change.best is not None and change.best.plan == change.same_plan.plan


def sensitivity_report(changes: Sequence[Change]) -> list[RenderableType]:
    """The part of a report about what would help."""
    columns, rows = change_rows(changes)
    others = [
        f"{change.what}: {change.best.plan}" for change in changes if change.best is not None and not _same(change)
    ]
    reasons = [f"{change.what}: {change.reason}" for change in changes if change.reason is not None]
    base = changes[0].base
    bound = ", ".join(f"{what} {s / base.step_time_s:.1%}" for what, s in resources(base).items())
    return [
        Text(),
        facts({"bound by": bound}),
        Text(),
        heading("What would help", "throughput with more of one thing; per percent: percent of throughput"),
        table(columns, rows, left=("more of",)),
        *notes("* another plan is best then", others),
        *notes("Cannot run", reasons),
    ]
