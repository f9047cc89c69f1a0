"""Hierarchical collectives: one step inside each domain, one across, one after the other.

An all-reduce reduce-scatters inside the domain, all-reduces each of the g parts over its own rail and gathers inside
(Jia et al., "Highly scalable deep learning training system with mixed-precision", 2018). Fewer bytes leave the domain
than in a flat ring, 2 (N - 1)/N * S/g instead of 2 (n - 1)/n * S/g from each GPU, and the number of steps grows with
g + N instead of g N, but the levels wait for each other. It is what TPUs do across pods, and Gaudi and Ascend across
servers; NCCL has no such algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from simllm.network.fabric import Fabric
from simllm.network.group import Spread
from simllm.network.ring import broadcast, ring
from simllm.network.terms import Hops, Load, Terms, candidates
from simllm.network.torus import torus, torus_broadcast

__all__ = ["hierarchical", "hierarchical_broadcast", "in_series"]


def hierarchical(fabric: Fabric, passes: int) -> tuple[Terms, ...]:
    """All-reduce (2 ``passes``), all-gather or reduce-scatter (1) in two levels; empty inside one domain.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = hierarchical(fabric(load_cluster("dgx-h100", 32), Group(size=32)), 2)[0]
    >>> terms.scaleup_bytes == 2 * 7 / 8, terms.scaleout_bytes == 2 * 3 / 4 / 8
    (True, True)
    """
    if fabric.out is None:
        return ()
    return in_series("hierarchical", _inside(fabric, lambda level: _level(level, passes)), _across(fabric, passes))


def hierarchical_broadcast(fabric: Fabric) -> tuple[Terms, ...]:
    """Broadcast to one GPU of each domain, then inside each; empty inside one domain."""
    if fabric.out is None:
        return ()
    inside = _inside(fabric, lambda level: torus_broadcast(level) or broadcast(level))
    blocks = fabric.domain.blocks
    return in_series("hierarchical", inside, _rail(fabric, blocks - 1, 1.0, (blocks - 1) / fabric.size))


def _level(fabric: Fabric, passes: int) -> tuple[Terms, ...]:
    return torus(fabric, passes) or ring(fabric, passes)


def _inside(fabric: Fabric, algorithm: Callable[[Fabric], tuple[Terms, ...]]) -> tuple[Terms, ...]:
    members = fabric.domain.most
    if members == 1:
        return ()
    alone = Spread(blocks=1, most=members, least=members)
    return algorithm(replace(fabric, size=members, domain=alone, out=None, cuts=()))


def _across(fabric: Fabric, passes: int) -> tuple[Terms, ...]:
    blocks = fabric.domain.blocks
    wire = passes * (blocks - 1) / blocks
    return _rail(fabric, passes * (blocks - 1), wire, wire / fabric.domain.most)


def _rail(fabric: Fabric, steps: int, wire: float, bytes_per_gpu: float) -> tuple[Terms, ...]:
    """A ring of the domains, ``wire`` bytes out of each over the NICs of all its members."""
    assert fabric.out is not None
    curve = fabric.out.ring
    loads = [Load(link=cut.name, share=wire, bandwidth=cut.members * cut.bandwidth, curve=curve) for cut in fabric.cuts]
    return candidates(
        "hierarchical",
        launches=[fabric.up.ring, curve] if fabric.domain.most == 1 else [curve],
        hops=[Hops(count=steps, curve=curve)],
        loads=loads,
        slots=fabric.size,
        scaleup_bytes=0.0,
        scaleout_bytes=bytes_per_gpu,
    )


def in_series(algorithm: str, first: tuple[Terms, ...], second: tuple[Terms, ...]) -> tuple[Terms, ...]:
    """Two levels that run one after the other, each in its own protocol: times add up, the longer one limits.

    What hides in one level cannot hide in the other, so nothing is taken to.
    """
    if not first:
        return second
    summed = []
    for a, b in product(first, second):
        limit = max(a, b, key=lambda terms: terms.s_per_byte)
        summed.append(
            Terms(
                algorithm=algorithm,
                protocol=limit.protocol,
                most_bytes=min(a.most_bytes, b.most_bytes),
                latency_s=a.latency_s + b.latency_s,
                s_per_byte=a.s_per_byte + b.s_per_byte,
                s_per_sqrt_byte=a.s_per_sqrt_byte + b.s_per_sqrt_byte,
                threads_s_per_byte=a.threads_s_per_byte + b.threads_s_per_byte,
                scaleup_bytes=a.scaleup_bytes + b.scaleup_bytes,
                scaleout_bytes=a.scaleout_bytes + b.scaleout_bytes,
                bottleneck=limit.bottleneck,
                bottleneck_bandwidth=limit.bottleneck_bandwidth,
            )
        )
    return tuple(summed)
