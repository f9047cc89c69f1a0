"""Why a plan is good and why another loses, in terms of where the time goes."""

from __future__ import annotations

from simllm.training import Estimate
from simllm.units import format_bytes, format_duration

__all__ = ["CAUSES", "GROUPS", "difference", "explain_difference", "limits"]

#: Causes of time in the words of tables.
CAUSES = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise kernels",
    "tensor_parallel": "tensor-parallel communication",
    "context_parallel": "context-parallel communication",
    "expert_parallel": "expert-parallel communication",
    "data_parallel": "data-parallel communication",
    "host": "host launches",
    "offload": "transfers to the host",
    "recompute": "recomputation",
    "pipeline_p2p": "pipeline transfers",
    "pipeline_bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "gradient_clipping": "gradient clipping",
}
#: Groups of ranks whose traffic makes up a cause of time.
GROUPS = {
    "tensor_parallel": ("tp", "tp_gradients"),
    "context_parallel": ("cp", "cp_heads", "cp_ring"),
    "expert_parallel": ("ep", "etp"),
    "data_parallel": ("dp", "dp_replicas", "expert_dp", "expert_dp_replicas"),
    "pipeline_p2p": ("pp", "tied_tables"),
}


def limits(answer: Estimate) -> str:
    """What binds a plan: its largest causes of time with their link, and its memory.

    Parameters
    ----------
    answer : Estimate
    """
    causes = sorted(answer.time.by_cause.items(), key=lambda item: -item[1])
    parts = []
    for cause, seconds in causes[:3]:
        share = seconds / answer.step_time_s
        if share < 0.01:
            break
        links = {t.bottleneck for t in answer.communication if t.group in GROUPS.get(cause, ())}
        over = f" over {' and '.join(sorted(links))}" if links else ""
        parts.append(f"{CAUSES[cause]}{over} ({share:.0%})")
    free = answer.cluster.accelerator.memory_bytes - answer.peak_memory_bytes
    stage = f"on pipeline rank {answer.peak_stage.rank}, " if answer.plan.pp > 1 else ""
    room = f"{format_bytes(free)} of a GPU stay free" if free >= 0 else f"{format_bytes(-free)} more than a GPU has"
    return f"{', '.join(parts)}; memory: {stage}{room}"


def difference(best: Estimate, other: Estimate) -> dict[str, float]:
    """Seconds that another plan needs more (or, negative, less) than the best one, by cause.

    For the tokens of a step of the best plan and, where the numbers of GPUs differ, in GPU time: seconds on as many
    GPUs as the best one has. With the same GPUs and batch they add up to the difference of the step times.

    Parameters
    ----------
    best, other : Estimate
    """
    scale = other.plan.num_gpus / best.plan.num_gpus * best.tokens_per_step / other.tokens_per_step
    return {cause: other.time.by_cause[cause] * scale - seconds for cause, seconds in best.time.by_cause.items()}


def explain_difference(best: Estimate, other: Estimate) -> str:
    """Where another plan loses against the best one.

    Parameters
    ----------
    best, other : Estimate
    """
    changes = difference(best, other)
    slower = sum(changes.values()) / best.step_time_s
    worse = sorted((c for c in changes if changes[c] > 0.002 * best.step_time_s), key=lambda c: -changes[c])
    better = sorted((c for c in changes if changes[c] < -0.002 * best.step_time_s), key=lambda c: changes[c])
    if other.plan.num_gpus != best.plan.num_gpus:
        head = f"{other.plan.num_gpus} GPUs, step {format_duration(other.step_time_s)}, {slower:+.1%} GPU time"
    elif slower < 5e-4:
        head = "as fast"
    else:
        head = f"{slower:.1%} slower"
    lost = ", ".join(f"+{format_duration(changes[c])} {CAUSES[c]}" for c in worse[:3])
    won = ", ".join(f"-{format_duration(-changes[c])} {CAUSES[c]}" for c in better[:2])
    if not lost and not won:
        more = other.peak_memory_bytes - best.peak_memory_bytes
        if abs(more) < 2**20:
            return f"{head}, and as much memory"
        direction = "more" if more > 0 else "less"
        return f"{head}; {format_bytes(abs(more))} {direction} memory"
    return f"{head}: {lost or 'nothing lost'}" + (f"; gains {won}" if won else "")
