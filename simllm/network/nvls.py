"""In-switch reduction over NVLink (NVLS), and its tree across domains (NVLSTree).

The switch adds what n GPUs hold: each GPU owns 1/n of the buffer, loads the sum of its part through the switch (every
GPU sends that part once) and stores the result to all with one multicast. A GPU thus sends S + S/n bytes instead of a
ring's 2 (n - 1)/n * S (Klenk et al., "An in-network architecture for accelerating shared-memory multiprocessor
collectives", ISCA 2020; NCCL 2.17). Its latency does not depend on n.

Between domains the owners of each part run a double binary tree over their NICs, all rails at once (NCCL NVLSTree), in
the Simple protocol only: a high latency for every level of the tree, and no loss of bandwidth with their number. The
thread blocks that load and multicast then feed the NICs as well, and the switch reaches less of the wire: two nodes of
H100 an algbw of 255 GB/s over NICs that would carry 390, one node 273.
"""

from __future__ import annotations

from math import log2

from simllm.hardware.links import SwitchCurve
from simllm.network.fabric import Fabric
from simllm.network.terms import Hops, Load, Terms, candidates
from simllm.network.tree import tree_loads

__all__ = ["nvls", "nvls_tree"]


def _switch_load(fabric: Fabric, switch: SwitchCurve) -> Load:
    members = fabric.domain.most
    return Load(link=fabric.up.name, share=(members + 1) / members, bandwidth=fabric.up_bandwidth, curve=switch)


def nvls(fabric: Fabric) -> tuple[Terms, ...]:
    """In-switch all-reduce of a group inside one domain; empty where the switch does not reduce for such a group.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> terms = nvls(fabric(load_cluster("dgx-h100", 8), Group(size=8)))[0]
    >>> terms.scaleup_bytes, 470 < 2 * 7 / 8 / terms.s_per_byte / 1e9 < 510
    (1.125, True)
    """
    switch = fabric.up.switch
    if switch is None or fabric.out is not None or fabric.domain.least < switch.minimum_group.value:
        return ()
    load = _switch_load(fabric, switch)
    return candidates(
        "nvls",
        launches=[switch],
        hops=[],
        loads=[load],
        scaleup_bytes=load.share,
        scaleout_bytes=0.0,
    )


def nvls_tree(fabric: Fabric) -> tuple[Terms, ...]:
    """In-switch reduction inside each domain and a tree across; empty where one of the two does not exist."""
    switch, curve = fabric.up.switch, fabric.out.tree if fabric.out else None
    if switch is None or curve is None or fabric.domain.least < switch.minimum_group.value:
        return ()
    load = _switch_load(fabric, switch.onward)
    blocks = fabric.domain.blocks
    return candidates(
        "nvls_tree",
        launches=[switch, curve],
        hops=[Hops(count=2 * log2(blocks), curve=curve)],
        loads=[load, *tree_loads(fabric, curve)],
        scaleup_bytes=load.share,
        scaleout_bytes=2 * (blocks - 1) / fabric.size,
    )
