"""One estimate to read: what it takes, where the time goes, what fills the memory, what is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.parallel.memory import StageMemory
from simllm.planner.binding import resources
from simllm.planner.reasons import CAUSES, limits
from simllm.planner.sensitivity import Change
from simllm.report.text import facts, heading, notes, table
from simllm.training import Estimate
from simllm.training.budget import Budget
from simllm.training.offload import HostMemory
from simllm.units import format_bytes, format_count, format_duration

__all__ = [
    "MEMORY",
    "breakdown",
    "budget_line",
    "estimate_dict",
    "estimate_report",
    "host_line",
    "kinds_table",
    "memory_line",
    "plan_line",
    "question",
    "step_line",
]

#: Kinds of memory in the words of tables.
MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations kept",
    "working": "at work at the peak",
    "gathered": "gathered parameters",
    "buffers": "communication buffers",
    "context": "context and libraries",
}
_GROUPS = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "cp_heads": "context parallel, heads",
    "cp_ring": "context parallel, ring",
    "pp": "pipeline",
    "dp": "data parallel",
    "ep": "experts",
    "etp": "expert tensor parallel",
    "dp_replicas": "data parallel replicas",
    "expert_dp": "experts' data parallel",
    "expert_dp_replicas": "experts' replicas",
    "gradient_norm": "norm of the gradients",
    "tp_gradients": "gradients over tp",
    "tied_tables": "tied tables",
}


def estimate_dict(answer: Estimate, run: Budget | None = None, changes: Sequence[Change] = ()) -> dict[str, Any]:
    """An estimate as plain data, with the run of so many tokens and what would help where they were asked for."""
    document = answer.to_dict()
    document["time"]["by_resource"] = resources(answer)
    if run is not None:
        document["training_run"] = run.to_dict()
    if changes:
        document["sensitivity"] = [change.to_dict() for change in changes]
    return document


def question(answer: Estimate) -> Text:
    """The line that says what was asked."""
    model, cluster, training = answer.model, answer.cluster, answer.training
    nodes = f"{cluster.num_nodes} node{'s' if cluster.num_nodes > 1 else ''}"
    where = f"{cluster.num_gpus} x {cluster.accelerator.name} ({cluster.name}, {nodes})"
    size = format_count(model.parameters.total)
    return heading(model.name, f"{size} parameters, sequences of {training.seq_len}, on {where}")


def estimate_report(answer: Estimate, run: Budget | None = None) -> list[RenderableType]:
    """One estimate to read."""
    plan = answer.plan
    batches = f"{plan.num_micro_batches} micro-batch{'es' if plan.num_micro_batches > 1 else ''}"
    rows = {
        "plan": plan_line(answer),
        "batch": f"{plan.global_batch_size} sequences, {format_count(answer.tokens_per_step)} tokens a step, {batches}",
        "step time": step_line(answer),
        "throughput": f"{answer.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
        f"{answer.model_tflops_per_gpu:.0f} model TFLOP/s a GPU, "
        f"MFU {answer.mfu:.1%} ({answer.training.flop_convention}), HFU {answer.hfu:.1%}",
        "memory": memory_line(answer),
    }
    if answer.host_memory:
        rows["host"] = host_line(answer.host_memory)
    if run:
        rows["run"] = budget_line(run)
    rows["limited by"] = limits(answer)
    parts: list[RenderableType] = [question(answer), Text(), facts(rows), Text(), breakdown(answer)]
    parts += [Text(), _states(answer)]
    if len(answer.stages) > 1:
        parts += [Text(), _stages(answer)]
    if answer.communication:
        parts += [Text(), _communication(answer)]
    return parts + notes("Assumptions", answer.assumptions)


def plan_line(answer: Estimate) -> str:
    """The plan in one line."""
    return f"{answer.plan}, {answer.plan.precision}, {answer.plan.schedule}, {answer.training.software.name}"


def step_line(answer: Estimate) -> str:
    """The step with the range that published runs would lie in."""
    low, high = answer.step_time_interval_s
    span = f"{format_duration(low)} to {format_duration(high)}"
    return f"{format_duration(answer.step_time_s)} ({span} in eight of ten published runs)"


def memory_line(answer: Estimate) -> str:
    """The peak against what there is."""
    peak, usable = answer.peak_memory_bytes, answer.usable_memory_bytes
    whole = answer.cluster.accelerator.memory_bytes
    low, high = answer.peak_memory_interval_bytes
    # In the interval that published peaks lie in, as step_line says of times.
    found = f"{format_bytes(peak)} ({format_bytes(low)} to {format_bytes(high)})"
    room = f"{format_bytes(whole - usable)} of head-room"
    if peak <= usable:
        free = format_bytes(whole - peak)
        return f"{found} of {format_bytes(whole)} at the peak: fits, {free} free with {room}"
    much = format_bytes(peak - usable)
    return f"{found} of {format_bytes(whole)} with {room}: DOES NOT FIT, {much} too much"


def host_line(host: HostMemory) -> str:
    """What a node's host keeps, against what it has."""
    parts = [f"{format_bytes(host.memory_bytes)} of {format_bytes(host.memory_capacity_bytes)} of a node's memory"]
    if host.nvme_bytes:
        parts.append(f"{format_bytes(host.nvme_bytes)} of {format_bytes(host.nvme_capacity_bytes)} of its drives")
    return f"{', '.join(parts)}: {'fits' if host.fits else 'DOES NOT FIT'}"


def budget_line(run: Budget) -> str:
    """A run in one line."""
    text = f"{format_count(run.tokens)} tokens: {format_duration(run.time_s)}, {format_count(run.gpu_hours)} GPU-hours"
    if run.usd is None:
        return f"{text}; no price is known for the device, give --price"
    return f"{text}, {format_count(run.usd)} USD at {run.usd_per_gpu_hour:.2f} USD per GPU-hour"


def breakdown(answer: Estimate) -> Table:
    """Seconds by cause and bytes by kind, side by side; both add up to their totals."""
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_row(_causes(answer), kinds_table(answer))
    return grid


def _causes(answer: Estimate) -> Table:
    total = answer.step_time_s
    causes = sorted(answer.time.by_cause.items(), key=lambda item: -item[1])
    rows = [(CAUSES[name], format_duration(s), f"{s / total:.1%}", _bar(s / total)) for name, s in causes if s > 0]
    rows.append(("step", format_duration(total), "100%", ""))
    return table(("where the time goes", "", "share", " "), rows, left=("where the time goes", " "), bold=len(rows) - 1)


def kinds_table(answer: Estimate) -> Table:
    """Bytes at the peak by kind."""
    peak = answer.peak_memory_bytes
    kinds = sorted(answer.peak_stage.by_kind.items(), key=lambda item: -item[1])
    rows = [(MEMORY[name], format_bytes(n), f"{n / peak:.1%}") for name, n in kinds if n > 0]
    rows.append(("peak", format_bytes(peak), "100%"))
    title = f"memory of rank {answer.peak_stage.rank}" if answer.plan.pp > 1 else "memory of a GPU"
    return table((title, "", "share"), rows, left=(title,), bold=len(rows) - 1)


def _bar(share: float, width: int = 8) -> str:
    """A bar of eighths of a column.

    >>> _bar(0.5, 4), _bar(0.0, 4)
    ('██', '')
    """
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _states(answer: Estimate) -> Table:
    """Every multiplier of the parameters, with its reason."""
    rows = [(term.what, f"{term.bytes_per_parameter:.4g}", term.why) for term in answer.state_terms]
    columns = ("kept per parameter, unsharded", "bytes", "because")
    return table(columns, rows, left=(columns[0], columns[2]), wrap=(columns[2],))


def _stages(answer: Estimate) -> Table:
    kinds = [kind for kind in MEMORY if any(stage.by_kind[kind] > 0 for stage in answer.stages)]
    columns = ("rank", "peak", "in flight", *kinds)
    rows = [
        (
            str(stage.rank),
            format_bytes(stage.peak_bytes),
            f"{stage.in_flight:.3g}",
            *(format_bytes(stage.by_kind[kind]) for kind in kinds),
        )
        for stage in _spread(answer)
    ]
    return table(columns, rows)


def _spread(answer: Estimate) -> list[StageMemory]:
    """All stages of a short pipeline; of a long one the ends, the fullest and the slowest."""
    if len(answer.stages) <= 8:
        return list(answer.stages)
    last = len(answer.stages) - 1
    shown = {0, 1, last - 1, last, answer.peak_stage.rank, answer.time.busiest_stage}
    return [answer.stages[rank] for rank in sorted(shown)]


def _communication(answer: Estimate) -> Table:
    rows = [
        (
            _GROUPS.get(traffic.group, traffic.group.replace("_", " ")),
            traffic.operation,
            str(traffic.ranks),
            str(traffic.stride),
            f"{traffic.calls:g}",
            format_bytes(traffic.size_bytes),
            format_duration(traffic.time_s),
            traffic.bottleneck,
        )
        for traffic in answer.communication
    ]
    columns = ("communication in a step", "operation", "ranks", "stride", "calls", "bytes", "unhidden", "limited by")
    return table(columns, rows, left=("communication in a step", "operation", "limited by"))
