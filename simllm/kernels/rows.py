"""Timed kernels as rows, in SI units: what was timed, on what, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["AttentionRow", "MatmulRow", "Rows", "SkippedRow", "StreamRow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulRow:
    """One timed matmul, in SI units; ``quantise`` as `Kernels.matmul` takes it."""

    index: int
    accelerator: str
    precision: str
    m: int
    n: int
    k: int
    count: int
    time_s: float
    library: str
    source: str
    harness: bool
    sustained: bool
    quantise: str

    @property
    def shape(self) -> tuple[int, ...]:
        """What makes two rows the same problem."""
        return (self.m, self.n, self.k, self.count)

    @property
    def scored(self) -> bool:
        """Whether the row is of a size that training runs are made of."""
        return min(self.m, self.n, self.k) >= 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRow:
    """One timed attention kernel, in SI units."""

    index: int
    accelerator: str
    implementation: str
    direction: str
    precision: str
    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    v_head_dim: int
    work_fraction: float
    time_s: float
    library: str
    source: str
    kv_cache: bool
    harness: bool
    sustained: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """What makes two rows the same problem."""
        return (self.batch, self.heads, self.kv_heads, self.seq_len, self.head_dim, self.v_head_dim)

    @property
    def flops(self) -> float:
        """Matmul work over the scores that the mask keeps; backward, without recomputation, twice that of forward."""
        forward = 2.0 * self.batch * self.seq_len**2 * self.heads * (self.head_dim + self.v_head_dim)
        return forward * self.work_fraction * (2.0 if self.direction == "backward" else 1.0)

    @property
    def scored(self) -> bool:
        """Whether the row is of a size that training runs are made of."""
        return self.seq_len >= 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRow:
    """One timed kernel, or chain of kernels, that only moves bytes; ``kind`` as `Kernels.memory_bound` takes it."""

    index: int
    accelerator: str
    kind: str
    size_bytes: int
    kernels: int
    time_s: float
    library: str
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        """What makes two rows of one kind the same problem."""
        return (self.size_bytes, self.kernels)

    @property
    def scored(self) -> bool:
        """Whether the row is of a size that training runs are made of."""
        return self.size_bytes >= 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRow:
    """A row that is not priced, and why."""

    index: int
    reason: str


class Rows(NamedTuple):
    """The rows of a table by kind, and those that say too little."""

    matmuls: list[MatmulRow]
    attentions: list[AttentionRow]
    streams: list[StreamRow]
    skipped: list[SkippedRow]
