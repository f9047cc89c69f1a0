"""Fine-tuning to read: one method on one cluster, and all methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from simllm.models import Model
from simllm.planner.finetune import FineTuning
from simllm.report.estimates import breakdown, budget_line, memory_line, plan_line, step_line
from simllm.report.text import facts, heading, notes, paragraph, table
from simllm.training.budget import Budget
from simllm.units import format_bytes, format_count, format_duration

__all__ = ["comparison_dict", "comparison_report", "counts_dict", "counts_report", "finetune_dict", "finetune_report"]


def counts_dict(model: Model) -> dict[str, Any]:
    """Counts of a method without a cluster."""
    return FineTuning(model=model, search=None).to_dict()


def _counts(model: Model) -> dict[str, str]:
    method = model.method
    assert method is not None
    trained, total = model.trainable_parameters, model.parameters.total
    return {
        "method": f"{method.name}, {method.paper}",
        "trains": f"{trained:,} of {total:,} parameters, {trained / total:.4%}: {method.formula}",
    }


def counts_report(model: Model) -> list[RenderableType]:
    """Counts of a method to read."""
    return [heading(model.name, "fine-tuned"), Text(), facts(_counts(model))]


def finetune_dict(answer: FineTuning, run: Budget | None = None) -> dict[str, Any]:
    """One method as plain data."""
    return answer.to_dict() | ({"training_run": run.to_dict()} if run else {})


def finetune_report(answer: FineTuning, run: Budget | None = None) -> list[RenderableType]:
    """One method on one cluster to read."""
    best = answer.best
    rows = _counts(answer.model)
    if best is None:
        return [
            heading(answer.model.name, "fine-tuned"),
            Text(),
            facts(rows),
            Text(),
            paragraph("No combination of degrees can run: the batch or the model does not divide over the GPUs."),
        ]
    where = f"{best.cluster.num_gpus} x {best.cluster.accelerator.name} ({best.cluster.name})"
    rows |= {"plan" if answer.fits else "nearest to fitting": plan_line(best), "memory": memory_line(best)}
    if answer.fits:
        rows |= {
            "batch": f"{best.plan.global_batch_size} sequences a step; a GPU holds up to "
            f"{answer.largest_micro_batch} at once",
            "step time": step_line(best),
            "throughput": f"{best.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
            f"{best.tokens_per_s_per_gpu * best.plan.num_gpus:,.0f} in all",
        }
        if run:
            rows["dataset"] = budget_line(run)
    card = answer.smallest_gpu
    rows["smallest GPU"] = (
        f"{card.name}, {format_bytes(card.memory_bytes)}: one sequence at a time, everything recomputed"
        if card
        else "none of the catalog alone"
    )
    return [
        heading(answer.model.name, f"fine-tuned on {where}, sequences of {best.training.seq_len}"),
        Text(),
        facts(rows),
        Text(),
        breakdown(best),
        *notes("Assumptions", best.assumptions),
    ]


def comparison_dict(answers: Sequence[tuple[str, FineTuning]]) -> list[dict[str, Any]]:
    """All methods as plain data."""
    return [
        {"method": name, "refused": answer.refused} if answer.refused else answer.to_dict() for name, answer in answers
    ]


def comparison_report(
    model: Model, answers: Sequence[tuple[str, FineTuning]], tokens: int | None = None
) -> list[RenderableType]:
    """All methods side by side to read."""
    known = [answer.best for _, answer in answers if answer.best is not None]
    where = ""
    if known:
        one = known[0]
        where = (
            f"on {one.cluster.num_gpus} x {one.cluster.accelerator.name} ({one.cluster.name}), sequences of "
            f"{one.training.seq_len}, {one.plan.global_batch_size} a step"
        )
    columns: tuple[str, ...] = (
        "method",
        "trained",
        "weights",
        "states",
        "activ.",
        "peak",
        "fits",
        "batch",
        "tok/s",
        "smallest GPU",
    )
    if tokens is not None:
        columns = (*columns[:-1], "time", columns[-1])
    rows = [_row(name, answer, tokens) for name, answer in answers if not answer.refused]
    refused = [answer.refused for _, answer in answers if answer.refused]
    return [
        heading(model.name, f"fine-tuned {where}".strip()),
        Text(),
        table(columns, rows, left=("method", "fits", "smallest GPU")),
        Text(),
        paragraph(
            "GiB of a GPU under the best plan, or the one nearest to fitting: weights, gradients and optimizer "
            "states, activations and what is at work. batch: sequences that a GPU can hold at once. smallest GPU: one "
            "sequence at a time, everything recomputed."
        ),
        *notes("Not for this model", refused),
    ]


def _gib(size: float) -> str:
    """GiB with a digit behind the point, so that a table stays narrow.

    >>> _gib(3 * 2**29)
    '1.5'
    """
    return f"{size / 2**30:.1f}"


def _row(name: str, answer: FineTuning, tokens: int | None) -> tuple[str, ...]:
    trained = answer.model.trainable_parameters
    best, card = answer.best, answer.smallest_gpu
    smallest = card.name if card else "none"
    dataset = (
        () if tokens is None else (format_duration(best.training_time_s(tokens)) if best and answer.fits else "-",)
    )
    if best is None:
        return (name, format_count(trained), "-", "-", "-", "-", "no", "-", "-", *dataset, smallest)
    kinds = best.peak_stage.by_kind
    return (
        name,
        format_count(trained),
        _gib(kinds["parameters"]),
        _gib(kinds["gradients"] + kinds["optimizer"]),
        _gib(kinds["activations"] + kinds["working"] + kinds["gathered"]),
        _gib(best.peak_memory_bytes),
        "yes" if answer.fits else "no",
        str(answer.largest_micro_batch) if answer.fits else "-",
        f"{best.tokens_per_s_per_gpu * best.plan.num_gpus:,.0f}" if answer.fits else "-",
        *dataset,
        smallest,
    )
