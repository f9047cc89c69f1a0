"""An alignment task to read: its passes, its models and their memory."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from simllm.models import Model
from simllm.report.text import facts, heading, table
from simllm.training.alignment import TASKS, Alignment
from simllm.units import format_bytes, format_duration

__all__ = ["alignment_report"]


def alignment_report(model: Model, answer: Alignment | None, where: str) -> list[RenderableType]:
    """A step of a task to read."""
    if answer is None:
        return [heading(model.name, f"no plan of {where} can run this")]
    peak, whole = answer.peak_memory_bytes, answer.capacity_bytes
    rows = {
        "task": f"{answer.task}: {TASKS[answer.task]}",
        "plan": f"{answer.plan}, {answer.plan.precision}; models {answer.placement}, {answer.gpus} GPUs in all",
        "step time": format_duration(answer.step_time_s),
        "throughput": f"{answer.tokens_per_s_per_gpu:,.0f} tokens/s a GPU",
        "memory": f"{format_bytes(peak)} of {format_bytes(whole)} at the peak: "
        f"{'fits' if answer.fits else 'DOES NOT FIT'}",
    }
    passes = [
        (one.name, one.role, format_duration(one.time_s), format_bytes(one.transient_bytes)) for one in answer.passes
    ]
    kept = [(role, format_bytes(size)) for role, size in answer.kept_bytes.items()]
    return [
        heading(model.name, f"aligned on {where}"),
        Text(),
        facts(rows),
        Text(),
        table(("pass", "model", "time", "memory of the pass"), passes, left=("pass", "model")),
        Text(),
        table(("model", "weights and states kept on a GPU"), kept, left=("model",)),
    ]
