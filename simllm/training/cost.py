"""Seconds by cause: the unit in which the parts of a step are added up."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Cost"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that one piece of work adds to the critical path of a rank, by cause.

    Attributes
    ----------
    matmul, attention, elementwise : float
        Kernels: matrix products, attention cores, everything bound by memory bandwidth.
    tensor_parallel, context_parallel, expert_parallel : float
        Collectives inside layers, as far as they show.
    data_parallel : float
        Gathers and reductions of parameters and gradients, as far as they show.
    host : float
        What the host needs beyond the device to launch the kernels.
    recompute : float
        Everything that runs again in the backward pass.
    offload : float
        Transfers to the host and back, as far as they show.
    """

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    data_parallel: float = 0.0
    host: float = 0.0
    recompute: float = 0.0
    offload: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.tensor_parallel + other.tensor_parallel,
            self.context_parallel + other.context_parallel,
            self.expert_parallel + other.expert_parallel,
            self.data_parallel + other.data_parallel,
            self.host + other.host,
            self.recompute + other.recompute,
            self.offload + other.offload,
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(
            self.matmul * factor,
            self.attention * factor,
            self.elementwise * factor,
            self.tensor_parallel * factor,
            self.context_parallel * factor,
            self.expert_parallel * factor,
            self.data_parallel * factor,
            self.host * factor,
            self.recompute * factor,
            self.offload * factor,
        )

    @property
    def total(self) -> float:
        """Seconds of all causes together."""
        return (
            self.matmul
            + self.attention
            + self.elementwise
            + self.tensor_parallel
            + self.context_parallel
            + self.expert_parallel
            + self.data_parallel
            + self.host
            + self.recompute
            + self.offload
        )

    @property
    def compute(self) -> float:
        """Seconds in kernels."""
        return self.matmul + self.attention + self.elementwise

    def by_cause(self) -> dict[str, float]:
        """Cause -> seconds."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
