"""What the host needs to start a collective when one process drives several GPUs.

Kernels start asynchronously, so the host's work hides behind that of the GPUs until it takes longer: the time of a
collective in a row of them is the larger of the two. One process with g GPUs posts g kernels, and for an all-to-all a
send and a receive for every peer of every GPU. A process (or thread) for each rank posts one kernel, which is part of
the launch of every formula here.

    posting = g * (launch + messages * message),   messages = 2 (n - 1) for an all-to-all, 2 for send and receive

Published sweeps of one process show it as a floor: 35 us for the ring collectives and 87 us for the all-to-all of 8
A100, 45 and 75 us of 8 H100, whatever the size up to a few megabytes.
"""

from __future__ import annotations

from simllm.errors import UnsupportedError
from simllm.network.fabric import Fabric

__all__ = ["posting_s"]


def posting_s(operation: str, fabric: Fabric) -> float:
    """Seconds the host needs to post one collective; zero where every rank has a process of its own.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.network.fabric import fabric
    >>> from simllm.network.group import Group
    >>> posting_s("all_reduce", fabric(load_cluster("dgx-a100", 8), Group(size=8)))
    0.0
    >>> one = fabric(load_cluster("dgx-a100", 8), Group(size=8, ranks_per_process=8))
    >>> 30e-6 < posting_s("all_reduce", one) < posting_s("all_to_all", one) < 100e-6
    True
    """
    if fabric.ranks_per_process == 1 or fabric.size == 1:
        return 0.0
    cost = fabric.up.posting
    if cost is None:
        raise UnsupportedError(
            f"nobody measured one process that drives several devices over {fabric.up.name}; use a process for each"
        )
    messages = {"all_to_all": 2 * (fabric.size - 1), "send_recv": 2}.get(operation, 0)
    return fabric.ranks_per_process * (cost.launch.si + messages * cost.message.si)
