"""Send and receive between neighbours: rank i sends S bytes to rank i + 1 while it receives from rank i - 1.

Two ranks of one domain have the links between that pair (all of a GPU's links behind a switch, one of seven in a mesh
of eight); ranks of two domains have the sender's share of the NICs. A tapered tier is crossed by the last member of
each subtree only, and has the share of all members. The slowest pair of the group decides.

Calls follow each other, so what a call costs hides behind the bytes of the one before, or the other way round: 106 KiB
to 1 MiB between two A100 take the same 10 us, and 8 MiB take 27 us, not 38.
"""

from __future__ import annotations

from dataclasses import replace

from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates

__all__ = ["send_recv"]


def send_recv(fabric: Fabric) -> tuple[Terms, ...]:
    """Every rank sends the buffer to the next one.

    Examples
    --------
    Neighbouring pipeline stages in two nodes: 50 GB/s of NIC for each GPU.

    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = send_recv(fabric(load_cluster("dgx-h100", 16), Group(size=2, stride=8)))[-1]
    >>> terms.bottleneck, terms.bottleneck_bandwidth
    ('infiniband', 50000000000.0)
    """
    n, blocks = fabric.size, fabric.domain.blocks
    if fabric.out is None:
        curve, within = fabric.up.p2p, 1.0
    else:
        curve, within = fabric.out.p2p, (n - blocks) / n
    loads = [
        Load(link=cut.name, share=1.0, bandwidth=cut.bandwidth * (cut.least if level else 1), curve=curve)
        for level, cut in enumerate(fabric.cuts)
    ]
    if within > 0:
        up = fabric.up.p2p
        loads.append(Load(link=fabric.up.name, share=1.0, bandwidth=fabric.pair_bandwidth, curve=up))
    found = candidates(
        "p2p",
        launches=[curve] if fabric.out is None else [fabric.up.p2p, curve],
        hops=[Hops(count=1, curve=curve)],
        loads=loads,
        scaleup_bytes=within,
        scaleout_bytes=1 - within,
    )
    # The next call is started while the bytes of the one before are still under way.
    return tuple(replace(terms, hidden_s=terms.latency_s) for terms in found)
