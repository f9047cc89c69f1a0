"""Which links a group of ranks can use: how many of its members share a node, a scale-up domain, a leaf.

Ranks are placed contiguously: rank r sits on GPU r, GPUs fill nodes in order, nodes fill scale-up domains in order.
A group is the ranks 0, stride, 2 * stride, ...; the other groups of its kind are the same shape, shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
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
    concurrent : int or None
        Groups of this shape that run at once in each domain and share its NICs; None for as many as its GPUs make up,
        as the groups of a plan do. A GPU alone still has no more than its own NICs.
    ranks_per_process : int
        Ranks that one process drives, one after the other; 1 for a process or thread each, as training runs do.

    Examples
    --------
    >>> Group(size=16, stride=8)
    Group(size=16, stride=8)
    """

    size: int
    stride: int = 1
    concurrent: int | None = field(default=None, repr=False)
    ranks_per_process: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        for name in ("size", "stride", "ranks_per_process"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"group {name}={value} must be a whole number of at least 1")
        if self.concurrent is not None and (not isinstance(self.concurrent, int) or self.concurrent < 1):
            raise InputError(f"group concurrent={self.concurrent} must be a whole number of at least 1")

    @classmethod
    def of(cls, ranks: Sequence[int]) -> Group:
        """The group of a list of ranks at equal distances, in any order, such as ``[0, 8, 16, 24]``.

        Where the list begins does not matter: groups that are shifted against each other cost the same.

        Examples
        --------
        >>> Group.of([3, 11, 19, 27])
        Group(size=4, stride=8)
        >>> Group.of([0, 1, 1])
        Traceback (most recent call last):
            ...
        simllm.errors.InputError: rank 1 is listed twice in the group [0, 1, 1]; list every rank once
        """
        ordered = sorted(ranks)
        if not ordered:
            raise InputError("a group of no ranks; list at least one")
        for rank in ordered:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise InputError(f"rank {rank!r} is not a whole number of at least 0")
        steps = {b - a for a, b in pairwise(ordered)}
        if 0 in steps:
            twice = next(a for a, b in pairwise(ordered) if a == b)
            raise InputError(f"rank {twice} is listed twice in the group {list(ranks)}; list every rank once")
        if len(steps) > 1:
            raise InputError(
                f"the ranks {ordered} are not at equal distances ({', '.join(map(str, sorted(steps)))}); "
                "price each regular part as a group of its own"
            )
        return cls(size=len(ordered), stride=steps.pop() if steps else 1)

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
