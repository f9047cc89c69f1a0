"""Ring all-reduce, all-gather, reduce-scatter and broadcast, flat over all members with every NIC in use.

Each of the n ranks passes slots of S/n bytes to its neighbour: n - 1 times to reduce-scatter, n - 1 times to gather,
both for an all-reduce (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
JPDC 2009). The library runs one ring per channel and lets each channel leave the node through another GPU, so a node
with g members sends the ring's bytes through g NICs at once (NCCL, src/graph/connect.cc).

    bytes per rank = f (n - 1) / n * S,    f = 2 for all-reduce, 1 for all-gather and reduce-scatter
    steps = f (n - 1), of which f (N - 1) wait for another domain; they hide behind their bytes (`simllm.network.terms`)

A GPU also copies part of a slot between the user's buffer and the ring's, which shows where few ranks make slots large.
A broadcast is one pipelined pass of all S bytes around the ring. Calls that follow each other, as in nccl-tests,
overlap, so the hops inside a domain count once, whatever their number (NCCL's own model has one hwLat for them; 4 and
8 A100 take the same 65 us for 4 MiB), while each of the N - 1 crossings shows. In LL not even those show: what a call
takes is what the threads of one rank need to hand the message on. NCCL starts one thread for every 8 n bytes, at least
64 (NCCL_LL_THREAD_THRESHOLD, src/graph/tuning.cc and src/enqueue.cc), so short messages are handed on at one rate and
those beyond 512 n bytes by more and more threads in the time of the first 512 n: 4 nodes of 8 A100 take 15 us for 8
KiB, 23 us for 16 KiB and 26 us for 32 KiB, 16 such nodes 74, 84 and 104 us for 64, 128 and 256 KiB.

    LL = launch + min(S, 512 n) / injection + S / rate

Large messages go in chunks of a fixed size (NCCL: an eighth of its 4 MiB buffer on each channel, src/enqueue.cc). Where
a chunk is staged it arrives whole before it leaves for the next domain, so that a buffer up to the chunk c of all
channels is stored and forwarded at each of the N - 1 crossings and a larger one waits for its first chunk only:

    crossings = (N - 1) (step + min(S, c) / B)
"""

from __future__ import annotations

from dataclasses import replace

from simllm.hardware.links import Curve
from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates
from simllm.network.tuning import reaches

__all__ = ["broadcast", "ring"]

# NCCL in LL: the fewest threads it starts, and the bytes for each and each rank that it takes to start more.
_FEWEST_THREADS = 64
_BYTES_A_THREAD = 8


def ring(fabric: Fabric, passes: int) -> tuple[Terms, ...]:
    """Ring collective of ``passes`` rounds: 2 for all-reduce, 1 for all-gather and reduce-scatter.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = ring(fabric(load_cluster("dgx-h100", 16), Group(size=16)), 2)[-1]
    >>> terms.bottleneck, terms.scaleup_bytes + terms.scaleout_bytes == 2 * 15 / 16
    ('infiniband', True)
    """
    n, g = fabric.size, fabric.domain.most
    wire = passes * (n - 1) / n
    inside = wire if fabric.out is None else wire * (g - 1) / g
    crossings = passes * (fabric.domain.blocks - 1)
    up, out = fabric.up_ring, fabric.out.ring if fabric.out else None
    tuning = None if out else fabric.up.tuning
    copied = up.copied_slots / n if g > 1 else 0.0
    found = candidates(
        "ring",
        launches=[curve for curve in (up, out) if curve],
        hops=_hops(up, out, passes * (n - 1) - crossings, crossings),
        loads=_loads(fabric, up, out, inside + copied, wire),
        slots=n,
        reach=None if tuning is None else reaches(tuning, n, passes),
        overlapped=True,
        scaleup_bytes=inside,
        scaleout_bytes=wire - inside,
    )
    if out is not None or up.injection is None:
        return found
    return tuple(option for terms in found for option in _handed_on(terms, up.injection.si / wire, n))


def broadcast(fabric: Fabric) -> tuple[Terms, ...]:
    """Pipelined broadcast along the ring: all S bytes over each of its n - 1 edges."""
    n, blocks = fabric.size, fabric.domain.blocks
    up = fabric.up.broadcast or fabric.up.ring
    out = (fabric.out.broadcast or fabric.out.ring) if fabric.out else None
    launches = [curve for curve in (up, out) if curve]
    found = candidates(
        "ring",
        launches=launches,
        hops=_hops(up, out, min(n - blocks, 1), blocks - 1),
        loads=_loads(fabric, up, out, 1.0 if n > blocks else 0.0, 1.0),
        slots=n,
        scaleup_bytes=(n - blocks) / n,
        scaleout_bytes=(blocks - 1) / n,
    )
    if out is not None and out.chunk_bytes:
        found = tuple(option for terms in found for option in _stored(terms, fabric, out))
    injection = (out.injection if out else None) or up.injection
    if injection is None:
        return found
    return tuple(option for terms in found for option in _handed_on(terms, injection.si, n))


def _handed_on(terms: Terms, injection: float, ranks: int) -> tuple[Terms, ...]:
    """A collective in LL by as many threads as the message is worth: the fewest at first, then more and more of them.

    The time for that grows with a message up to the size from which more threads start, and stays: the cheaper of two
    lines is right on either side of it.
    """
    if terms.protocol != "LL":
        return (terms,)
    return (
        replace(terms, threads_s_per_byte=1 / injection),
        replace(terms, latency_s=terms.latency_s + _FEWEST_THREADS * _BYTES_A_THREAD * ranks / injection),
    )


def _stored(terms: Terms, fabric: Fabric, out: Curve) -> tuple[Terms, ...]:
    """A broadcast whose chunks arrive whole before they cross to the next domain: one chunk, and many.

    Both cost the same for a buffer of one chunk, and the cheaper of the two is right on either side of it.
    """
    if terms.protocol != "Simple":
        return (terms,)
    domain = fabric.cuts[0]
    crossing_s = (domain.blocks - 1) / (domain.members * domain.bandwidth * out.part("Simple"))
    return (
        replace(terms, s_per_byte=terms.s_per_byte + crossing_s),
        replace(terms, latency_s=terms.latency_s + crossing_s * out.chunk_bytes),
    )


def _hops(up: Curve, out: Curve | None, inside: int, crossings: int) -> list[Hops]:
    steps = [Hops(count=inside, curve=up, across=out)]
    if out is not None:
        steps.append(Hops(count=crossings, curve=out))
    return steps


def _loads(fabric: Fabric, up: Curve, out: Curve | None, inside: float, wire: float) -> list[Load]:
    """Loads of a ring with ``wire`` bytes over every edge, ``inside`` of them over each GPU's scale-up links."""
    loads = []
    if out is not None:
        loads = [
            Load(link=cut.name, share=wire, bandwidth=cut.members * cut.bandwidth, curve=out) for cut in fabric.cuts
        ]
    if inside:
        loads.append(Load(link=fabric.up.name, share=inside, bandwidth=fabric.up_bandwidth, curve=up))
    return loads
