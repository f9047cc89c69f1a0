"""All-reduce in the switches between nodes (InfiniBand SHARP, NCCL's CollNet).

The switches of each rail add what its NICs send and multicast the sum, so a domain with g members sends its S bytes out
once over its g NICs and receives them once, whatever the number of domains (Graham et al., "Scalable hierarchical
aggregation protocol", COM-HPC 2016; NCCL CollNetDirect). Inside the domain the parts are reduced in the NVLink switch
where it can, else scattered and gathered over the scale-up links.

    bytes out of a domain = S,   steps = 1 across, whatever the size of the group

A NIC gives about 20 of its 25 GB/s to such sums (HDR; Jeaugey, NVIDIA/nccl issue 320), and with a NIC for each GPU the
links inside decide: 480 GB/s of bus bandwidth of DGX H100 nodes (NVIDIA GTC 2024, S62129), 450 at 16 GB (Azure ND H100
v5), where trees over the same NICs reach 360 to 380.

No class of the catalog offers it, because a cluster has it only with switches and a plugin for it; ask for it by name.
"""

from __future__ import annotations

from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates

__all__ = ["collnet"]


def collnet(fabric: Fabric) -> tuple[Terms, ...]:
    """In-network all-reduce of a group that spans several domains; empty where the network cannot.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> (terms,) = collnet(fabric(load_cluster("dgx-h100", 256), Group(size=256)))
    >>> terms.scaleout_bytes, terms.bottleneck
    (0.125, 'nvlink4')
    """
    network = fabric.out.switch if fabric.out else None
    blocks, members = fabric.domain.blocks, fabric.domain.most
    if network is None or blocks < network.minimum_group.value:
        return ()
    up, inside = fabric.up.switch, []
    hops, sent = [], 0.0
    if up is not None and fabric.domain.least >= up.minimum_group.value:
        sent = (members + 1) / members
        inside = [Load(link=fabric.up.name, share=sent, bandwidth=fabric.up_bandwidth, curve=up.onward)]
    elif members > 1:
        sent = 2 * (members - 1) / members
        inside = [Load(link=fabric.up.name, share=sent, bandwidth=fabric.up_bandwidth, curve=fabric.up_ring)]
        hops = [Hops(count=2 * (members - 1), curve=fabric.up_ring)]
    return candidates(
        "collnet",
        protocol="Simple",
        launches=[up if up is not None and not hops and members > 1 else fabric.up_ring, network],
        hops=hops,
        loads=[
            *(
                Load(link=cut.name, share=1.0, bandwidth=cut.members * cut.bandwidth, curve=network)
                for cut in fabric.cuts
            ),
            *inside,
        ],
        scaleup_bytes=sent,
        scaleout_bytes=1 / members,
    )
