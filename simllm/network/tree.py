"""Double binary tree all-reduce across domains, with a chain inside each domain.

Half of the buffer is reduced up and broadcast down one binary tree of the domains, half the other; a domain that is an
inner node in one tree is a leaf in the other (Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth
broadcast, reduction and scan", Parallel Computing 2009; NCCL 2.4). The latency grows with the logarithm of the number
of domains, where a ring's grows with the number of ranks.

    steps = 2 (g - 1) inside, 2 log2 N across
    bytes out of the busiest domain: S for N = 2, 3/2 S for N = 3, 2 S from N = 4 on

The busiest domain is an inner node with a parent and two children in its tree: S/2 up and S down, and S/2 up as a leaf
of the other. With two domains each only has the other, which is why two nodes reach twice the bandwidth of their NICs
in busbw.
"""

from __future__ import annotations

from math import log2

from simllm.hardware.links import PROTOCOLS, Curve
from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates

__all__ = ["busiest_domain_bytes", "tree", "tree_loads"]


def busiest_domain_bytes(domains: int) -> float:
    """Bytes that the busiest domain of a double binary tree sends out, for each byte of the buffer.

    >>> [busiest_domain_bytes(domains) for domains in (1, 2, 3, 4, 64)]
    [0.0, 1.0, 1.5, 2.0, 2.0]
    """
    return 0.0 if domains == 1 else min(domains / 2, 2.0)


def tree_loads(fabric: Fabric, curve: Curve) -> list[Load]:
    """What a double binary tree sends across every boundary of the fabric."""
    return [
        Load(
            link=cut.name,
            share=busiest_domain_bytes(cut.blocks),
            bandwidth=cut.members * cut.bandwidth,
            curve=curve,
        )
        for cut in fabric.cuts
    ]


def tree(fabric: Fabric) -> tuple[Terms, ...]:
    """Tree all-reduce of a group that spans several domains; empty where the network has no tree.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = tree(fabric(load_cluster("dgx-a100", 32), Group(size=32)))[0]
    >>> round(terms.scaleup_bytes + terms.scaleout_bytes, 4) == round(2 * 31 / 32, 4)
    True
    """
    curve = fabric.out.tree if fabric.out else None
    if curve is None:
        return ()
    g, blocks = fabric.domain.most, fabric.domain.blocks
    up = fabric.up_ring
    inside = 2 * (g - 1) / g
    loads = tree_loads(fabric, curve)
    if g > 1:
        loads.append(Load(link=fabric.up.name, share=inside, bandwidth=fabric.up_bandwidth, curve=up))
    return candidates(
        "tree",
        launches=[up, curve],
        hops=[
            Hops(count=2 * (g - 1), curve=up, across=curve),
            Hops(count=2 * log2(blocks), curve=curve),
        ],
        loads=loads,
        # A slot of the rings inside is a part of the buffer, one of the tree is all of it.
        reach={name: curve.slot_bytes(name) for name in PROTOCOLS if curve.has(name)},
        scaleup_bytes=inside,
        scaleout_bytes=2 * (blocks - 1) / fabric.size,
    )
