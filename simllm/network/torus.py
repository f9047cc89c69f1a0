"""Collectives on a torus (TPU ICI): rings along every axis at once.

With d axes the buffer is cut in d parts, each of which visits the axes in another order, so all links work all the
time. A closed axis (wraparound) carries a ring each way, an open one half of that. With W bytes/s on a link each way,
an all-gather or reduce-scatter of S bytes among n chips takes

    (n - 1)/n * S / (sum over axes of 2 W for a closed axis, W for an open one)

and an all-reduce twice that, which is the vendor's all-reduce bandwidth of a pod: 256 chips * 200 GB/s = 51.2 TB/s
(Google Cloud, TPU v5e). A hop costs a fixed time and the farthest chip is half an axis away on a closed axis.

An all-to-all is bound by the middle of the longest axis: n S k / 4 byte-hops over 2 n W, so S k / (8 W) closed and
S k / (4 W) open, which is the bisection bound (16 x 16 chips of 50 GB/s: 25 GB/s a chip, Google's 1.6 TB/s).

Sister groups of a group whose members stand r chips apart along an axis use the same links, so each has 1/r of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from simllm.hardware.fabric import Torus
from simllm.network.terms import Hops, Load, Terms, candidates

if TYPE_CHECKING:
    from simllm.network.fabric import Fabric

__all__ = ["Grid", "grid", "torus", "torus_broadcast"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What a group can use of a torus.

    Parameters
    ----------
    ring_bandwidth, shuffle_bandwidth, pair_bandwidth : float
        Bytes/s that a chip can send in rings along all axes, in an all-to-all, and to its neighbour in the group.
    hops : int
        Links to the farthest member.
    """

    ring_bandwidth: float
    shuffle_bandwidth: float
    pair_bandwidth: float
    hops: int


def grid(wiring: Torus, shape: tuple[int, ...], members: int, stride: int, chip_bandwidth: float) -> Grid:
    """The axes that ``members`` chips, ``stride`` apart, span in a slice of ``shape``; the first axis varies fastest.

    Examples
    --------
    A whole TPU v5e pod, then one of its columns.

    >>> from simllm.hardware.fabric import load_fabric
    >>> wiring = load_fabric("torus-2d-16")
    >>> grid(wiring, (16, 16), 256, 1, 200e9)
    Grid(ring_bandwidth=200000000000.0, shuffle_bandwidth=25000000000.0, pair_bandwidth=50000000000.0, hops=16)
    >>> grid(wiring, (16, 16), 16, 16, 200e9).ring_bandwidth
    100000000000.0
    """
    link = chip_bandwidth / (2 * int(wiring.dimensions.value))
    apart, left = stride, members
    ring, shuffle, hops, pair = 0.0, float("inf"), 0, link
    for length in shape:
        if left == 1:
            break
        if apart >= length and apart % length == 0:
            apart //= length
            continue
        if length % apart:  # an irregular group: one open ring around the rest
            length = apart * left
        extent = min(length // apart, left)
        closed = wiring.wraps(length) and extent * apart == length
        ring += link * (2 if closed else 1) / apart
        shuffle = min(shuffle, link * (8 if closed else 4) / (extent * apart))
        hops += ceil(extent * apart / 2) if closed else (extent - 1) * apart
        pair = min(pair, link / apart)
        left, apart = ceil(left / extent), 1
    if ring == 0:
        ring = pair
    return Grid(ring_bandwidth=ring, shuffle_bandwidth=min(shuffle, ring), pair_bandwidth=pair, hops=hops)


def torus(fabric: Fabric, passes: int) -> tuple[Terms, ...]:
    """All-reduce (2 ``passes``), all-gather or reduce-scatter (1) among the members of one torus."""
    members = fabric.domain.most
    return _rings(fabric, passes * (members - 1) / members, passes)


def torus_broadcast(fabric: Fabric) -> tuple[Terms, ...]:
    """Broadcast to the members of one torus along the rings of all axes."""
    return _rings(fabric, 1.0, 1)


def _rings(fabric: Fabric, wire: float, passes: int) -> tuple[Terms, ...]:
    if fabric.grid is None or fabric.domain.most == 1:
        return ()
    curve = fabric.up.ring
    load = Load(link=fabric.up.name, share=wire, bandwidth=fabric.up_bandwidth, curve=curve)
    return candidates(
        "torus",
        protocol="none",
        launches=[curve],
        hops=[Hops(count=passes * fabric.grid.hops, curve=curve)],
        loads=[load],
        scaleup_bytes=wire,
        scaleout_bytes=0.0,
    )
