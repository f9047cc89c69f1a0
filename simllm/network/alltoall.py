"""All-to-all: every rank sends S/n bytes to every other rank, directly.

Inside one domain a GPU sends (n - 1)/n * S over its links, and its channels move all of S, for they copy what stays on
the GPU too: among few ranks they are the slower part. Pairs of A100, H200 and B200 take 1.64, 0.90 and 0.81 ms for 512
MiB, 16 times the 20, 36.7 and 40 GB/s that NCCL counts for a channel, where the wires alone take 1.1, 0.7 and 0.4 ms.

Across N domains the members outside, (n - g)/n * S, go through the GPU's share of the NICs while the members inside go
over the scale-up links, and the slower of the two decides; busbw then tends to N/(N - 1) times the NIC bandwidth of one
GPU (Jeaugey, NVIDIA/nccl-tests issue 130). A tapered tier carries what leaves the subtree, which for an all-to-all is
nearly everything.

    latency = launch + peers * step inside or across: one message to post for each peer,
    hidden behind the bytes of those before
"""

from __future__ import annotations

from dataclasses import replace

from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates

__all__ = ["all_to_all"]


def all_to_all(fabric: Fabric) -> tuple[Terms, ...]:
    """Direct all-to-all of S bytes a rank, its own part among them.

    Examples
    --------
    Two nodes of 8 GPUs with one 50 GB/s NIC each: half of the buffer leaves the node.

    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = all_to_all(fabric(load_cluster("dgx-h100", 16), Group(size=16)))[0]
    >>> terms.scaleup_bytes, terms.scaleout_bytes, terms.bottleneck
    (0.4375, 0.5, 'infiniband')
    """
    n, g = fabric.size, fabric.domain.most
    up = fabric.up.all_to_all
    inside, outside = (g - 1) / n, (n - g) / n
    launches = [up]
    hops = [Hops(count=g - 1, curve=up, across=fabric.out.all_to_all if fabric.out else None)]
    loads = []
    if g > 1:
        loads.append(
            Load(
                link=fabric.up.name,
                share=inside,
                bandwidth=fabric.shuffle_bandwidth,
                curve=up,
                messages=g - 1,
            )
        )
    if fabric.out is not None:
        out = fabric.out.all_to_all
        launches.append(out)
        hops.append(Hops(count=n - g, curve=out))
        # The members of the emptiest subtree have the most peers outside of it.
        loads += [
            Load(link=cut.name, share=(n - cut.least) / n, bandwidth=cut.bandwidth, curve=out) for cut in fabric.cuts
        ]
    found = candidates(
        "pairwise",
        launches=launches,
        hops=hops,
        loads=loads,
        slots=n,
        overlapped=True,
        scaleup_bytes=inside,
        scaleout_bytes=outside,
    )
    if fabric.out is not None:
        return found
    # All of the buffer passes through the channels, what stays on the GPU too.
    return tuple(replace(terms, s_per_byte=max(terms.s_per_byte, 1 / up.moved)) for terms in found)
