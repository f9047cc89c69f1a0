"""Which links a group of ranks can use: how many of its members share a node, a scale-up domain, a leaf.

Ranks are placed contiguously: rank r sits on GPU r, GPUs fill nodes in order, nodes fill scale-up domains in order.
A group is the ranks 0, stride, 2 * stride, ...; the other groups of its kind are the same shape, shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from simllm.errors import InputError

if TYPE_CHECKING:
    from simllm.hardware.cluster import Cluster

__all__ = ["Group", "Spread", "spread"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a group falls on equal blocks of GPUs (nodes, domains, pods).

    Parameters
    ----------
    blocks : int
        Blocks that hold at least one member.
    most, least : int
        Members in the fullest and in the emptiest of those blocks.
    """

    blocks: int
    most: int
    least: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The ranks that take part in one collective.

    Parameters
    ----------
    size : int
        Number of ranks.
    stride : int
        Distance between neighbouring ranks: 1 for the innermost axis of the plan (tensor parallelism), the product
        of the inner degrees for an outer axis (data or pipeline parallelism).

    Examples
    --------
    >>> Group(size=16, stride=8)
    Group(size=16, stride=8)
    """

    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"group {name}={value} must be a whole number of at least 1")

    def check_fits(self, cluster: Cluster) -> None:
        """Refuse a group with ranks beyond the last GPU of the cluster."""
        last = (self.size - 1) * self.stride
        if last >= cluster.num_gpus:
            raise InputError(
                f"a group of {self.size} ranks with stride {self.stride} reaches rank {last}, but cluster "
                f"{cluster.name} has {cluster.num_gpus} GPUs; give a smaller group or more GPUs"
            )


@lru_cache(maxsize=65536)
def spread(size: int, stride: int, block: int) -> Spread:
    """How ``size`` ranks, ``stride`` apart, fall on blocks of ``block`` GPUs.

    Examples
    --------
    Data parallelism over rails: one member in each of 4 nodes of 8. Then a group that straddles unevenly.

    >>> spread(4, 8, 8)
    Spread(blocks=4, most=1, least=1)
    >>> spread(10, 1, 8)
    Spread(blocks=2, most=8, least=2)
    >>> spread(4, 3, 8)
    Spread(blocks=2, most=3, least=1)
    """
    if stride >= block:
        return Spread(blocks=size, most=1, least=1)
    counts: dict[int, int] = {}
    for i in range(size):
        index = i * stride // block
        counts[index] = counts.get(index, 0) + 1
    return Spread(blocks=len(counts), most=max(counts.values()), least=min(counts.values()))
