"""What would help: the same question asked again with a tenth more of one thing at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.parallel.plan import Plan
from simllm.training import Estimate, Training, estimate
from simllm.training.estimate import plan_dict
from simllm.units import format_bytes, format_rate

__all__ = ["Change", "sensitivity"]

#: Sequences are lengthened to a multiple of this many tokens, as kernels are tiled, where the degrees allow it.
_TOKENS = 128

Search = Callable[[Cluster, Training, int], Estimate | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """The answer to one changed question.

    Attributes
    ----------
    what : str
        What was changed, in words.
    before, after : str
        Its value, with unit.
    factor : float
        After over before; batch and sequence have to stay divisible, so it may be more than was asked for.
    base : Estimate
        The plan on the unchanged question.
    same_plan : Estimate or None
        The same plan on the changed question; None where it cannot run, for ``reason``.
    reason : str or None
    best : Estimate or None
        The best plan of the changed question, where a second search was asked for.
    """

    what: str
    before: str
    after: str
    factor: float
    base: Estimate
    same_plan: Estimate | None
    reason: str | None
    best: Estimate | None

    def gain(self, answer: Estimate) -> float:
        """Relative change of the throughput in tokens/s."""
        return answer.tokens_per_s_per_gpu / self.base.tokens_per_s_per_gpu - 1

    @property
    def elasticity(self) -> float | None:
        """Percent of throughput for a percent of the thing; of a bandwidth: the share of the step that it binds."""
        if self.same_plan is None:
            return None
        return math.log1p(self.gain(self.same_plan)) / math.log(self.factor)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""

        def short(answer: Estimate | None) -> dict[str, Any] | None:
            if answer is None:
                return None
            return {
                "plan": plan_dict(answer.plan),
                "step_time_s": answer.step_time_s,
                "tokens_per_s_per_gpu": answer.tokens_per_s_per_gpu,
                "throughput_change": self.gain(answer),
                "peak_memory_bytes": answer.peak_memory_bytes,
                "fits": answer.fits,
            }

        return {
            "what": self.what,
            "before": self.before,
            "after": self.after,
            "factor": self.factor,
            "elasticity": self.elasticity,
            "same_plan": short(self.same_plan),
            "reason": self.reason,
            "best_plan": short(self.best),
        }


def sensitivity(answer: Estimate, *, factor: float = 1.1, search: Search | None = None) -> tuple[Change, ...]:
    """What a tenth more of each bandwidth, of memory, FLOP rate, batch and sequence would change.

    Parameters
    ----------
    answer : Estimate
        The plan to start from.
    factor : float
        How much more, above 1.
    search : callable, optional
        ``(cluster, training, global_batch_size) -> best estimate or None``; asked for every changed question, so that
        a plan that only pays on the changed cluster is seen. Without it only the same plan is estimated again.

    Returns
    -------
    tuple of Change
        In a fixed order; what the cluster does not have (a network in a single domain) is left out.

    Examples
    --------
    >>> from simllm import Cluster, Model, Plan, Training
    >>> plan = Plan(tp=8, dp=1, global_batch_size=8, sequence_parallel=True)
    >>> answer = estimate(Model.load("llama-2-7b"), Cluster.load("dgx-h100", 8), plan, Training(seq_len=4096))
    >>> [change.what for change in sensitivity(answer)]
    ['FLOP rate', 'memory bandwidth', 'memory', 'nvlink4 bandwidth', 'batch', 'sequence']
    """
    if not (math.isfinite(factor) and factor > 1):
        raise InputError(f"factor={factor} must be above 1, such as 1.1 for a tenth more")
    return tuple(_ask(answer, *question, search) for question in _questions(answer, factor))


def _ask(
    base: Estimate,
    what: str,
    before: str,
    after: str,
    factor: float,
    cluster: Cluster,
    training: Training,
    plan: Plan,
    search: Search | None,
) -> Change:
    again, reason = None, None
    try:
        again = estimate(base.model, cluster, plan, training)
    except InputError as error:
        reason = str(error)
    best = search(cluster, training, plan.global_batch_size) if search is not None else None
    return Change(
        what=what, before=before, after=after, factor=factor, base=base, same_plan=again, reason=reason, best=best
    )


def _questions(answer: Estimate, factor: float) -> Iterator[tuple[str, str, str, float, Cluster, Training, Plan]]:
    """Name, value before and after, factor, and the changed question."""
    cluster, training, plan = answer.cluster, answer.training, answer.plan
    card = cluster.accelerator
    rates = {name: rate * factor for name, rate in card.peak_flops.items()}
    faster = replace(cluster, accelerator=replace(card, peak_flops=rates))
    flops = [f"{rate / 1e12:,.0f} TFLOP/s" for rate in (answer.peak_flops, answer.peak_flops * factor)]
    yield "FLOP rate", flops[0], flops[1], factor, faster, training, plan
    hardware: list[tuple[str, float, Callable[[float], str], Cluster]] = [
        (
            "memory bandwidth",
            card.memory_bandwidth,
            format_rate,
            replace(cluster, accelerator=replace(card, memory_bandwidth=card.memory_bandwidth * factor)),
        ),
        (
            "memory",
            card.memory_bytes,
            format_bytes,
            replace(cluster, accelerator=replace(card, memory_bytes=round(card.memory_bytes * factor))),
        ),
    ]
    if cluster.gpus_per_domain > 1:
        hardware.append(
            (
                f"{cluster.scaleup_link} bandwidth",
                cluster.scaleup_bandwidth,
                format_rate,
                replace(cluster, scaleup_bandwidth=cluster.scaleup_bandwidth * factor),
            )
        )
    network = cluster.scaleout_bandwidth_per_node
    if network is not None and cluster.num_domains > 1:
        wider = replace(cluster, scaleout_bandwidth_per_node=network * factor)
        hardware.append((f"{cluster.scaleout_link} bandwidth", network, format_rate, wider))
    for what, value, words, changed in hardware:
        yield what, words(value), words(value * factor), factor, changed, training, plan
    batch = _next(plan.global_batch_size, factor, _batch_unit(plan))
    larger = replace(plan, global_batch_size=batch)
    sequences = f"{plan.global_batch_size} sequences", f"{batch} sequences"
    yield "batch", *sequences, batch / plan.global_batch_size, cluster, training, larger
    virtual = answer.model.graph.virtual_tokens
    length = _next(training.seq_len + virtual, factor, math.lcm(plan.tp * plan.cp, _TOKENS)) - virtual
    tokens = f"{training.seq_len} tokens", f"{length} tokens"
    yield "sequence", *tokens, length / training.seq_len, cluster, replace(training, seq_len=length), plan


def _batch_unit(plan: Plan) -> int:
    """The batch grows in whole micro-batches of every replica, in groups of the pipeline where it is interleaved."""
    return plan.dp * plan.micro_batch_size * (plan.pp if plan.schedule == "interleaved" else 1)


def _next(value: int, factor: float, unit: int) -> int:
    """The first multiple of a unit that is at least so many times the value.

    >>> _next(1024, 1.1, 64), _next(8192, 1.1, 128)
    (1152, 9088)
    """
    return math.ceil(value * factor / unit - 1e-9) * unit
