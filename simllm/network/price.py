"""The price of one collective on one group of one cluster.

Every algorithm that the cluster's library would consider is priced and the cheapest one taken, as the library's own
selector means to do, and the choice is reported. Sizes are as nccl-tests prints them: the buffer of an all-reduce,
broadcast or send/receive, the total of an all-gather or reduce-scatter, the send buffer of one rank of an all-to-all;
so are ``algbw`` (size over time) and ``busbw`` (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.network.alltoall import all_to_all
from simllm.network.collnet import collnet
from simllm.network.fabric import Fabric, fabric
from simllm.network.group import Group
from simllm.network.hierarchical import hierarchical, hierarchical_broadcast
from simllm.network.nvls import nvls, nvls_tree
from simllm.network.p2p import send_recv
from simllm.network.pat import pat
from simllm.network.posting import posting_s
from simllm.network.pxn import pxn
from simllm.network.ring import broadcast, ring
from simllm.network.terms import Terms
from simllm.network.torus import torus, torus_broadcast
from simllm.network.tree import tree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from simllm.hardware.cluster import Cluster

__all__ = ["OPERATIONS", "CollectiveCost", "bus_factor", "choices", "fastest", "price", "price_array", "sweep"]

_Algorithm = Callable[[Fabric], tuple[Terms, ...]]

#: Algorithms of every operation by name; point-to-point patterns have one each.
_ALGORITHMS: dict[str, dict[str, _Algorithm]] = {
    "all_reduce": {
        "ring": lambda fabric: ring(fabric, 2),
        "tree": tree,
        "nvls": nvls,
        "nvls_tree": nvls_tree,
        "collnet": collnet,
        "hierarchical": lambda fabric: hierarchical(fabric, 2),
        "torus": lambda fabric: () if fabric.out else torus(fabric, 2),
    },
    "all_gather": {
        "ring": lambda fabric: ring(fabric, 1),
        "pat": pat,
        "hierarchical": lambda fabric: hierarchical(fabric, 1),
        "torus": lambda fabric: () if fabric.out else torus(fabric, 1),
    },
    "broadcast": {
        "ring": broadcast,
        "hierarchical": hierarchical_broadcast,
        "torus": lambda fabric: () if fabric.out else torus_broadcast(fabric),
    },
    "all_to_all": {"pairwise": all_to_all, "pxn": pxn},
    "send_recv": {"p2p": send_recv},
}
_ALGORITHMS["reduce_scatter"] = _ALGORITHMS["all_gather"]

#: Operations that can be priced.
OPERATIONS: tuple[str, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCost:
    """What one collective costs and why.

    Parameters
    ----------
    operation : str
        One of `OPERATIONS`.
    size_bytes : float
        Size as nccl-tests prints it.
    group_size : int
        Ranks that take part.
    time_s : float
        Seconds, the sum of the next two.
    latency_s : float
        Launch, dependent steps and filling of the pipeline.
    bandwidth_s : float
        Bytes over the limiting link at the rate it reaches.
    algbw, busbw : float
        Size over time, and that times nccl-tests' factor, bytes/s.
    algorithm, protocol : str
        The cheapest choice; ``none`` for a group of one.
    bottleneck : str
        Link whose bytes take longest.
    bottleneck_bandwidth : float
        Its wire bandwidth, bytes/s: of one GPU inside a domain, of the members' share of a boundary outside.
    bytes_scaleup, bytes_scaleout : float
        Bytes that one GPU sends inside its domain and out of it, averaged over the group.
    """

    operation: str
    size_bytes: float
    group_size: int
    time_s: float
    latency_s: float
    bandwidth_s: float
    algbw: float
    busbw: float
    algorithm: str
    protocol: str
    bottleneck: str
    bottleneck_bandwidth: float
    bytes_scaleup: float
    bytes_scaleout: float


def bus_factor(operation: str, size: int) -> float:
    """busbw over algbw (nccl-tests, doc/PERFORMANCE.md).

    >>> bus_factor("all_reduce", 8), bus_factor("all_gather", 8), bus_factor("broadcast", 8)
    (1.75, 0.875, 1.0)
    """
    if operation == "all_reduce":
        return 2 * (size - 1) / size
    if operation in ("broadcast", "send_recv"):
        return 1.0
    return (size - 1) / size


def price(
    operation: str, size_bytes: float, cluster: Cluster, group: Group, algorithm: str | None = None
) -> CollectiveCost:
    """Time, bandwidth, algorithm and limiting link of one collective.

    Parameters
    ----------
    operation : str
        ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast`` or ``send_recv``.
    size_bytes : float
        Size as nccl-tests prints it.
    cluster : Cluster
        Where it runs.
    group : Group
        Which ranks take part.
    algorithm : str, optional
        Force one algorithm, also one that the cluster's library lacks; the cheapest one it offers otherwise.

    Raises
    ------
    InputError
        For an unknown operation or algorithm, a size that is not above zero, a group that does not fit the cluster.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> cost = price("all_reduce", 2**30, load_cluster("dgx-h100", 64), Group(size=64))
    >>> cost.algorithm, cost.protocol, cost.bottleneck, round(cost.busbw / 1e9) in range(320, 390)
    ('nvls_tree', 'Simple', 'infiniband', True)
    """
    if not (isfinite(size_bytes) and size_bytes > 0):
        raise InputError(f"size={size_bytes} bytes; a collective moves at least one byte, give a size above zero")
    options, floor_s = _terms(operation, cluster, group, algorithm)
    n = group.size
    if not options:
        return CollectiveCost(
            operation=operation,
            size_bytes=size_bytes,
            group_size=1,
            time_s=0.0,
            latency_s=0.0,
            bandwidth_s=0.0,
            algbw=0.0,
            busbw=0.0,
            algorithm="none",
            protocol="none",
            bottleneck="none",
            bottleneck_bandwidth=0.0,
            bytes_scaleup=0.0,
            bytes_scaleout=0.0,
        )
    time_s, best = float("inf"), options[0]
    for terms in options:
        seconds = terms.time_s(size_bytes)
        if seconds < time_s:
            time_s, best = seconds, terms
    bandwidth_s = best.s_per_byte * size_bytes
    time_s = max(time_s, floor_s)
    algbw = size_bytes / time_s
    return CollectiveCost(
        operation=operation,
        size_bytes=size_bytes,
        group_size=n,
        time_s=time_s,
        latency_s=time_s - bandwidth_s,
        bandwidth_s=bandwidth_s,
        algbw=algbw,
        busbw=algbw * bus_factor(operation, n),
        algorithm=best.algorithm,
        protocol=best.protocol,
        bottleneck=best.bottleneck,
        bottleneck_bandwidth=best.bottleneck_bandwidth,
        bytes_scaleup=best.scaleup_bytes * size_bytes,
        bytes_scaleout=best.scaleout_bytes * size_bytes,
    )


def price_array(
    operation: str, sizes_bytes: ArrayLike, cluster: Cluster, group: Group, algorithm: str | None = None
) -> NDArray[np.float64]:
    """Seconds of many sizes at once, the same numbers as `price`.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> times = price_array("all_gather", [1e6, 1e9], load_cluster("dgx-h100", 8), Group(size=8))
    >>> bool(times[0] < times[1])
    True
    """
    import numpy as np

    sizes = np.asarray(sizes_bytes, dtype=np.float64)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise InputError("a size is not above zero; a collective moves at least one byte")
    options, floor_s = _terms(operation, cluster, group, algorithm)
    return np.maximum(fastest(options, sizes), floor_s)


def fastest(options: tuple[Terms, ...], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of the cheapest of several algorithms at every size; zero where there is nothing to choose from."""
    import numpy as np

    times = np.zeros_like(sizes)
    roots = np.sqrt(sizes)
    for i, terms in enumerate(options):
        seconds = terms.times_s(sizes, roots)
        times = np.minimum(times, seconds) if i else seconds
    return times


def sweep(
    operation: str, sizes_bytes: Iterable[float], cluster: Cluster, group: Group, algorithm: str | None = None
) -> list[CollectiveCost]:
    """One price for every size, as nccl-tests runs them."""
    return [price(operation, size, cluster, group, algorithm) for size in sizes_bytes]


@lru_cache(maxsize=65536)
def _terms(operation: str, cluster: Cluster, group: Group, algorithm: str | None) -> tuple[tuple[Terms, ...], float]:
    """The algorithms to choose from (none for a group of one rank, which has nothing to do), and the host's floor."""
    view = fabric(cluster, group)
    options = choices(operation, view, algorithm)
    if algorithm is not None and group.size > 1 and not options:
        able = [name for name, terms in _ALGORITHMS[operation].items() if terms(view)]
        raise UnsupportedError(
            f"{algorithm} cannot run {operation} on {group.size} ranks with stride {group.stride} of {cluster.name}; "
            f"use {', '.join(able)}"
        )
    return options, posting_s(operation, view)


def choices(operation: str, view: Fabric, algorithm: str | None = None) -> tuple[Terms, ...]:
    """What the library offers for an operation on a group, or the one algorithm that is asked for."""
    if operation not in _ALGORITHMS:
        raise unknown_name("collective", operation, OPERATIONS)
    known = _ALGORITHMS[operation]
    if algorithm is not None and algorithm not in known:
        raise unknown_name(f"algorithm for {operation}", algorithm, known)
    if view.size == 1:
        return ()
    if algorithm is not None:
        return known[algorithm](view)
    offered = [name for name in known if name in view.up.algorithms or name in ("pairwise", "p2p")]
    options = tuple(terms for name in offered for terms in known[name](view))
    return options if view.out is not None and view.out.tuner else _selected(options)


def _selected(options: tuple[Terms, ...]) -> tuple[Terms, ...]:
    """What is left of the algorithms on offer where the library's own rules rule some out, whatever they would cost.

    Where the switches of the domains reduce, NCCL crosses between domains along trees: with NVLS inside for large
    messages, from GPU to GPU in the protocols of short ones. Its table of bandwidths and latencies puts NVLSTree before
    the plain tree (364 against 353 GB/s a node of eight H100, half the latency) and before rings, whose steps grow with
    the number of GPUs; only from gigabytes on, over a few nodes, it would take a ring that is a twentieth faster
    (NVIDIA/nccl v2.30 src/graph/tuning.cc). Plugins of cloud providers tune for themselves and may take any of them.
    """
    if not any(terms.algorithm == "nvls_tree" for terms in options):
        return options
    return tuple(
        terms
        for terms in options
        if terms.algorithm == "nvls_tree" or (terms.algorithm == "tree" and terms.protocol != "Simple")
    )
