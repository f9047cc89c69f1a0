"""The timeline of a step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from typing import Any

from simllm.report.estimates import plan_line
from simllm.training import Estimate
from simllm.training.timeline import Slice, StepTimeline

__all__ = ["trace_dict", "trace_json"]

_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "gradients of inputs",
    "W": "gradients of weights",
    "FB": "forward beside backward",
    "data_parallel": "gradients and parameters",
    "gradient_clipping": "gradient clipping",
    "offload": "transfers to the host",
    "optimizer": "optimizer",
}


def trace_dict(answer: Estimate, line: StepTimeline) -> dict[str, Any]:
    """The trace as plain data, in the Trace Event Format (complete events, in whole microseconds).

    A process stands for the job, a thread for one pipeline rank.

    Parameters
    ----------
    answer : Estimate
    line : StepTimeline
        Of the same plan.
    """
    title = f"{answer.model.name}: {answer.plan}"
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": title}}]
    for rank, slices in enumerate(line.ranks):
        name = f"pipeline rank {rank}"
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": name}})
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": rank, "args": {"sort_index": rank}})
        events += [_event(item, rank, line) for item in slices]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "model": answer.model.name,
            "cluster": f"{answer.cluster.num_gpus} x {answer.cluster.accelerator.name} ({answer.cluster.name})",
            "plan": plan_line(answer),
            "step_time_s": answer.step_time_s,
            "timeline_s": line.total_s,
        },
    }


def _event(item: Slice, rank: int, line: StepTimeline) -> dict[str, Any]:
    word = _NAMES.get(item.kind, item.kind)
    of_chunk = item.micro_batch >= 0
    # Whole microseconds: slices that touch must not overlap by a rounded nanosecond, or viewers drop them.
    start, end = round(item.start_s * 1e6), round(item.end_s * 1e6)
    args: dict[str, Any] = {}
    if of_chunk:
        args = {"micro_batch": item.micro_batch, "chunk": item.chunk}
        parts = line.parts[rank].get((item.kind, item.chunk), {})
        args |= {f"{cause}_us": seconds * 1e6 for cause, seconds in parts.items()}
    if item.beside >= 0:
        args["backward_of_micro_batch"] = item.beside
    return {
        "name": f"{item.kind} {item.micro_batch}" if of_chunk else word,
        "cat": word,
        "ph": "X",
        "ts": start,
        "dur": end - start,
        "pid": 0,
        "tid": rank,
        "args": args,
    }


def trace_json(answer: Estimate, line: StepTimeline) -> bytes:
    """The trace as a file."""
    return json.dumps(trace_dict(answer, line), allow_nan=False).encode()
