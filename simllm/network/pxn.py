"""All-to-all in two levels: over NVLink to the GPU on the rail of the destination, then along the rail (PXN).

A GPU hands what it has for the j-th GPU of any other node to its own node's j-th GPU, which sends the parts of all g
members together: N - 1 messages of g parts each instead of n - g of one, and none of them leaves its rail (NCCL 2.12,
"Doubling all2all performance with NVIDIA Collective Communication Library 2.12", NVIDIA blog 2022). The price is a
second pass over the scale-up links for what changes rails.

    scale-up bytes of a GPU = (g - 1)/n * S + (n - g)/n * (g - 1)/g * S,   across = (n - g)/n * S
"""

from __future__ import annotations

from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates

__all__ = ["pxn"]


def pxn(fabric: Fabric) -> tuple[Terms, ...]:
    """Hierarchical all-to-all; empty inside one domain and where a domain holds one member.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = pxn(fabric(load_cluster("dgx-h100", 16), Group(size=16)))[-1]
    >>> terms.scaleup_bytes, terms.scaleout_bytes, terms.bottleneck
    (0.875, 0.5, 'infiniband')
    """
    n, g = fabric.size, fabric.domain.most
    if fabric.out is None or g == 1:
        return ()
    up, out = fabric.up.all_to_all, fabric.out.all_to_all
    outside = (n - g) / n
    inside = (g - 1) / n + outside * (g - 1) / g
    return candidates(
        "pxn",
        launches=[up, out],
        hops=[Hops(count=2 * (g - 1), curve=up, across=out), Hops(count=fabric.domain.blocks - 1, curve=out)],
        loads=[
            Load(
                link=fabric.up.name,
                share=inside,
                bandwidth=fabric.shuffle_bandwidth,
                curve=up,
            ),
            # The members of the emptiest subtree have the most peers outside of it.
            *(
                Load(link=cut.name, share=(n - cut.least) / n, bandwidth=cut.bandwidth, curve=out)
                for cut in fabric.cuts
            ),
        ],
        slots=n,
        overlapped=True,
        scaleup_bytes=inside,
        scaleout_bytes=outside,
    )
