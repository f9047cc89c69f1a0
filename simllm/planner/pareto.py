"""The trade between time, GPUs, money and memory: plans that no other plan beats in everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simllm.errors import InputError, unknown_name
from simllm.training import Estimate

__all__ = ["PARETO_OBJECTIVES", "objective_value", "pareto_front"]


def _cost(answer: Estimate) -> float:
    price = answer.cluster.accelerator.price_usd_per_hour
    if price is None:
        raise InputError(
            f"no price is known for {answer.cluster.accelerator.name}; compare without cost, or use a profile with one"
        )
    return 1e6 * price / 3600 / answer.tokens_per_s_per_gpu


#: What a front may weigh: name -> (value of a plan, smaller is better; its unit).
PARETO_OBJECTIVES: dict[str, tuple[Callable[[Estimate], float], str]] = {
    "time": (lambda a: a.step_time_s / a.tokens_per_step * 1e9 / 86400, "days per billion tokens"),
    "gpus": (lambda a: float(a.plan.num_gpus), "GPUs"),
    "gpu-time": (lambda a: 1e6 / 3600 / a.tokens_per_s_per_gpu, "GPU-hours per million tokens"),
    "cost": (_cost, "USD per million tokens"),
    "memory": (lambda a: a.peak_memory_bytes / a.cluster.accelerator.memory_bytes, "share of the memory in use"),
}


def objective_value(answer: Estimate, objective: str) -> float:
    """What a plan costs in one objective; smaller is better."""
    if objective not in PARETO_OBJECTIVES:
        raise unknown_name("objective", objective, PARETO_OBJECTIVES)
    return PARETO_OBJECTIVES[objective][0](answer)


def pareto_front(
    answers: Sequence[Estimate], objectives: Sequence[str] = ("time", "gpus", "gpu-time", "memory")
) -> tuple[Estimate, ...]:
    """The plans that no other one beats: better in one objective and as good in all others.

    Plans that do not fit are left out. Of plans that are equal in all objectives the first one stays.

    Parameters
    ----------
    answers : sequence of Estimate
        Of one model; they may differ in cluster, size and batch.
    objectives : sequence of str
        Names in `PARETO_OBJECTIVES`; of ``cost`` every device must have a price.

    Returns
    -------
    tuple of Estimate
        By rising first objective.

    Examples
    --------
    >>> import simllm
    >>> model, training = simllm.Model.load("llama-2-7b"), simllm.Training(seq_len=4096)
    >>> found = [
    ...     simllm.plan(model, simllm.Cluster.load("dgx-h100", n), training, global_batch_size=64, top=1).plans[0]
    ...     for n in (8, 16)
    ... ]
    >>> [answer.plan.num_gpus for answer in pareto_front(found, ["time", "gpus"])]
    [16, 8]
    """
    if not objectives:
        raise InputError(f"no objectives given; use some of {', '.join(PARETO_OBJECTIVES)}")
    values: dict[tuple[float, ...], Estimate] = {}
    for answer in answers:
        if answer.fits:
            values.setdefault(tuple(objective_value(answer, name) for name in objectives), answer)
    front = [
        (value, answer)
        for value, answer in values.items()
        if not any(
            other != value and all(mine >= theirs for mine, theirs in zip(value, other, strict=True))
            for other in values
        )
    ]
    return tuple(answer for _, answer in sorted(front, key=lambda pair: pair[0]))
