"""All-gather and reduce-scatter along parallel aggregated trees (PAT), for one GPU of each node.

Every rank is the root of a binomial tree; the trees are shifted against each other and their messages of one round
aggregated, so the number of rounds is the logarithm of the number of ranks while each rank sends as many bytes as in a
ring. A rank handles each of the n parts once, which costs a little time for every part (Jeaugey, "PAT: a new algorithm
for all-gather and reduce-scatter operations at scale", 2025; NCCL 2.23, src/graph/tuning.cc).

    latency = launch + log2(n) * step + n * inner step,   bytes per rank = (n - 1)/n * S

No class of the catalog offers it: the published runs are older than it or have more GPUs a node. Ask for it by name.
"""

from __future__ import annotations

from math import ceil, log2

from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates

__all__ = ["pat"]


def pat(fabric: Fabric) -> tuple[Terms, ...]:
    """PAT all-gather or reduce-scatter; empty unless every domain holds one member.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> from simllm.network.ring import ring
    >>> rails = fabric(load_cluster("dgx-h100", 1024), Group(size=128, stride=8))
    >>> pat(rails)[0].latency_s < ring(rails, 1)[-1].latency_s / 4
    True
    """
    curve = fabric.out.pat if fabric.out else None
    if curve is None or fabric.domain.most > 1:
        return ()
    n = fabric.size
    wire = (n - 1) / n
    return candidates(
        "pat",
        protocol="Simple",
        launches=[curve],
        hops=[Hops(count=ceil(log2(n)), curve=curve), Hops(count=n, curve=curve, across=curve)],
        loads=[
            Load(link=cut.name, share=wire, bandwidth=cut.members * cut.bandwidth, curve=curve) for cut in fabric.cuts
        ],
        scaleup_bytes=0.0,
        scaleout_bytes=wire,
    )
