"""Ring all-reduce, all-gather, reduce-scatter and broadcast, flat over all members with every NIC in use.

Each of the n ranks passes slots of S/n bytes to its neighbour: n - 1 times to reduce-scatter, n - 1 times to gather,
both for an all-reduce (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
JPDC 2009). The library runs one ring per channel and lets each channel leave the node through another GPU, so a node
with g members sends the ring's bytes through g NICs at once (NCCL, src/graph/connect.cc).

    bytes per rank = f (n - 1) / n * S,    f = 2 for all-reduce, 1 for all-gather and reduce-scatter
    steps = f (n - 1), of which f (N - 1) wait for another domain

A GPU also copies part of a slot between the user's buffer and the ring's, which shows where few ranks make slots large.
A broadcast is one pipelined pass of all S bytes around the ring. Its latency is that of one hop, because nccl-tests
starts the next broadcast while the last one still travels; the hops behind it are paid as the pipeline fills.
"""

from __future__ import annotations

from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates, load_of

__all__ = ["broadcast", "ring"]


def ring(fabric: Fabric, passes: int) -> tuple[Terms, ...]:
    """Ring collective of ``passes`` rounds: 2 for all-reduce, 1 for all-gather and reduce-scatter.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = ring(fabric(load_cluster("dgx-h100", 16), Group(size=16)), 2)[0]
    >>> terms.bottleneck, terms.scaleup_bytes + terms.scaleout_bytes == 2 * 15 / 16
    ('infiniband', True)
    """
    n, g = fabric.size, fabric.domain.most
    wire = passes * (n - 1) / n
    inside = wire if fabric.out is None else wire * (g - 1) / g
    crossings = passes * (fabric.domain.blocks - 1)
    copied = fabric.up.ring.copied_slots / n if g > 1 else 0.0
    return candidates(
        "ring",
        launch_s=_launch(fabric),
        hops=_hops(fabric, passes * (n - 1) - crossings, crossings),
        loads=_loads(fabric, inside + copied, wire),
        scaleup_bytes=inside,
        scaleout_bytes=wire - inside,
    )


def broadcast(fabric: Fabric) -> tuple[Terms, ...]:
    """Pipelined broadcast along the ring: all S bytes over each of its n - 1 edges."""
    n, blocks = fabric.size, fabric.domain.blocks
    inside, across = _hops(fabric, n - blocks, blocks - 1)
    first = inside if inside.count else across
    filling = sum(hop.count * hop.bulk_step_s for hop in (inside, across)) - first.bulk_step_s
    return candidates(
        "ring",
        launch_s=fabric.up.ring.launch.si,
        hops=[Hops(count=1, step_s=first.step_s, bulk_step_s=first.bulk_step_s)],
        loads=_loads(fabric, 1.0 if inside.count else 0.0, 1.0, filling),
        scaleup_bytes=inside.count / n,
        scaleout_bytes=across.count / n,
    )


def _launch(fabric: Fabric) -> float:
    return fabric.up.ring.launch.si + (fabric.out.ring.launch.si if fabric.out else 0.0)


def _hops(fabric: Fabric, inside: int, crossings: int) -> tuple[Hops, Hops]:
    up = fabric.up.ring
    out = fabric.out.ring if fabric.out else up
    return (
        Hops(count=inside, step_s=up.step.si, bulk_step_s=out.inner_bulk_step_s(up)),
        Hops(count=crossings, step_s=out.step.si, bulk_step_s=out.bulk_step_s),
    )


def _loads(fabric: Fabric, inside: float, wire: float, filling_s: float = 0.0) -> list[Load]:
    """Loads of a ring with ``wire`` bytes over every edge, ``inside`` of them over each GPU's scale-up links."""
    loads = []
    if fabric.out is not None:
        loads = [
            load_of(
                fabric.out.ring,
                link=cut.name,
                share=wire,
                bandwidth=cut.members * cut.bandwidth,
                ramp_s=filling_s,
            )
            for cut in fabric.cuts
        ]
        filling_s = 0.0
    if inside:
        loads.append(
            load_of(fabric.up.ring, link=fabric.up.name, share=inside, bandwidth=fabric.up_bandwidth, ramp_s=filling_s)
        )
    return loads
