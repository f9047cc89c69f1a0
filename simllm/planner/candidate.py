"""A plan as the arrays of a search hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simllm.hardware import Cluster
from simllm.parallel.plan import Plan
from simllm.training.estimate import plan_dict

__all__ = ["Candidate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan with what it is ranked by.

    Attributes
    ----------
    cluster : Cluster
    plan : Plan
    step_time_s, peak_bytes : float
    usd_per_gpu_hour : float or None
        None where no price is known.
    """

    cluster: Cluster
    plan: Plan
    step_time_s: float
    peak_bytes: float
    usd_per_gpu_hour: float | None

    @property
    def gpu_seconds(self) -> float:
        """GPU time of a step."""
        return self.step_time_s * self.plan.num_gpus

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        price = self.usd_per_gpu_hour
        return {
            "plan": plan_dict(self.plan),
            "gpus": self.plan.num_gpus,
            "step_time_s": self.step_time_s,
            "gpu_seconds_per_step": self.gpu_seconds,
            "usd_per_step": None if price is None else self.gpu_seconds * price / 3600,
            "peak_memory_bytes": self.peak_bytes,
            "free_memory_bytes": self.cluster.accelerator.memory_bytes - self.peak_bytes,
        }
