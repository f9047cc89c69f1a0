"""A search to read: the best plans, why the first is first, and what was rejected for which reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.planner import PlanSearch
from simllm.planner.binding import resources
from simllm.planner.reasons import difference
from simllm.planner.sensitivity import Change
from simllm.report.estimates import breakdown, budget_line, kinds_table, memory_line, plan_line, question, step_line
from simllm.report.searches import changes, compared, fixes, front
from simllm.report.text import facts, heading, notes, table
from simllm.training.budget import Budget
from simllm.units import format_bytes, format_duration

__all__ = ["search_dict", "search_report"]


def search_dict(search: PlanSearch, runs: Sequence[Budget] = (), changes: Sequence[Change] = ()) -> dict[str, Any]:
    """A search as plain data; ``runs`` are those of its plans, ``changes`` what would help the first of them."""
    document = search.to_dict()
    for entry, answer in zip(document["plans"], search.plans, strict=True):
        entry["time"]["by_resource"] = resources(answer)
        if answer is not search.plans[0]:
            entry["against_first_s"] = difference(search.plans[0], answer)
    if changes:
        document["sensitivity"] = [change.to_dict() for change in changes]
    for entry, run in zip(document["plans"], runs, strict=False):
        entry["training_run"] = run.to_dict()
    return document


def search_report(search: PlanSearch, runs: Sequence[Budget] = ()) -> list[RenderableType]:
    """A search to read."""
    if not search.plans:
        return _nothing_fits(search)
    best = search.plans[0]
    rows = {
        "plan": plan_line(best),
        "step time": step_line(best),
        "throughput": f"{best.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
        f"{best.model_tflops_per_gpu:.0f} model TFLOP/s a GPU, "
        f"MFU {best.mfu:.1%} ({best.training.flop_convention}), HFU {best.hfu:.1%}",
        "memory": memory_line(best),
    }
    if runs:
        rows["run"] = budget_line(runs[0])
    rows["limited by"] = search.limits
    return [
        question(best),
        Text(),
        _plans(search),
        Text(),
        heading("The best plan"),
        facts(rows),
        Text(),
        breakdown(best),
        *notes("Why the others lose", search.why, first=2),
        *compared(search),
        *front(search),
        *_rejected(search),
        *fixes(search),
        *notes("Assumptions", best.assumptions),
    ]


#: Choices that are said in words: heading of their column, field of a plan.
_WORDS = (
    ("cp by", "cp_comm_type"),
    ("precision", "precision"),
    ("schedule", "schedule"),
    ("sp", "sequence_parallel"),
)


def _plans(search: PlanSearch) -> Table:
    always = {"tp", "pp", "dp"}
    degrees = [
        name
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
        if name in always or any(getattr(answer.plan, name) > 1 for answer in search.plans)
    ]
    gpus = ["GPUs"] if len({answer.plan.num_gpus for answer in search.plans}) > 1 else []
    # What all plans have in common is said once, with the best of them.
    varied = [
        (heading, name) for heading, name in _WORDS if len({getattr(answer.plan, name) for answer in search.plans}) > 1
    ]
    others = [heading for heading, _ in varied]
    columns = ("", *gpus, *degrees, "zero", "mbs", "recompute", *others, "step", "MFU", "memory", "free")
    rows = [
        (
            str(number),
            *([str(answer.plan.num_gpus)] if gpus else []),
            *(str(getattr(answer.plan, name)) for name in degrees),
            answer.plan.zero,
            str(answer.plan.micro_batch_size),
            str(answer.plan.recompute),
            *(_word(getattr(answer.plan, name)) for _, name in varied),
            format_duration(answer.step_time_s),
            f"{answer.mfu:.1%}",
            format_bytes(answer.peak_memory_bytes),
            format_bytes(answer.cluster.accelerator.memory_bytes - answer.peak_memory_bytes),
        )
        for number, answer in enumerate(search.plans, start=1)
    ]
    return table(columns, rows, left=("recompute", *others), bold=0)


def _word(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _rejected(search: PlanSearch) -> list[RenderableType]:
    found = f"{search.searched:,} combinations, {search.feasible:,} fit"
    found += f", {search.evaluations_per_s:,.0f} priced a second"
    rows = [(reason, f"{number:,}") for reason, number in search.rejected.items() if number]
    reasons = [table(("rejected because", "combinations"), rows, left=("rejected because",))] if rows else []
    return [Text(), heading("Searched", found), *reasons]


def _nothing_fits(search: PlanSearch) -> list[RenderableType]:
    parts: list[RenderableType] = [heading("No plan fits.")]
    nearest = search.nearest
    if nearest is not None and nearest.fits:
        parts = [heading("No plan that fits keeps the limits.")]
        rows = {"nearest plan": plan_line(nearest), "step time": step_line(nearest), "memory": memory_line(nearest)}
        parts = [question(nearest), Text(), *parts, facts(rows)]
    elif nearest is not None:
        rows = {"nearest to fitting": plan_line(nearest), "memory": memory_line(nearest)}
        parts = [question(nearest), Text(), *parts, facts(rows), Text(), kinds_table(nearest)]
    return [*parts, *changes(search), *compared(search), *_rejected(search), *fixes(search)]
