"""Collectives that run at the same time: links, NICs and uplinks shared on the topology graph.

Every collective loads the links in fixed proportions (`simllm.network.loads`). While several run, their rates are
max-min fair: all grow together until a link is full, those over it stop there and the others grow on (Bertsekas and
Gallager, "Data networks", 6.5.2). When one has finished, the others share what it leaves. Latencies do not shrink
with the number of collectives, and a collective alone takes what `simllm.network.price` says on its own links.

Kernels beside a collective slow down as well: the channels take multiprocessors and the copies take memory bandwidth.
The link class says by how much, as measured (`overlap_slowdown`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError, UnsupportedError
from simllm.hardware.fabric import Torus
from simllm.network.fabric import fabric
from simllm.network.group import Group
from simllm.network.loads import Loads, link_loads
from simllm.network.price import price
from simllm.network.schedules import Phase, all_to_all_schedule, broadcast_schedule, exchange_schedule, ring_schedule

if TYPE_CHECKING:
    import networkx as nx

    from simllm.hardware.cluster import Cluster

__all__ = ["Call", "concurrent_times", "fair_rates", "imbalance", "overlap_slowdown"]

Link = tuple[tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One of several collectives that start together.

    Parameters
    ----------
    operation : str
        ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``broadcast``.
    size_bytes : float
        Size as nccl-tests prints it.
    ranks : tuple of int
        The GPUs that take part, at equal distances.
    """

    operation: str
    size_bytes: float
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (isfinite(self.size_bytes) and self.size_bytes > 0):
            raise InputError(f"size={self.size_bytes} bytes; a collective moves at least one byte")
        Group.of(self.ranks)  # refuses ranks listed twice


def concurrent_times(cluster: Cluster, calls: Sequence[Call]) -> list[float]:
    """Seconds until each of several collectives is done.

    Parameters
    ----------
    cluster : Cluster
        Where they run; every GPU takes part in as many as list it.
    calls : sequence of Call
        They start at the same time.

    Examples
    --------
    Eight data-parallel groups, one for each GPU of 4 nodes, share nothing; twice the same groups share everything.

    >>> from simllm.hardware.cluster import load_cluster
    >>> cluster = load_cluster("dgx-h100", 32)
    >>> groups = [tuple(range(first, 32, 8)) for first in range(8)]
    >>> calls = [Call(operation="all_gather", size_bytes=2**30, ranks=ranks) for ranks in groups]
    >>> alone, (first, *_) = concurrent_times(cluster, calls[:1])[0], concurrent_times(cluster, calls)
    >>> round(first / alone, 3), concurrent_times(cluster, calls + calls)[0] > 1.9 * first
    (1.0, True)
    """
    from simllm.hardware.topology import build_topology

    if isinstance(cluster.scaleup_fabric, Torus):
        raise UnsupportedError("collectives that share a torus are not modelled; price them one after the other")
    graph = build_topology(cluster)
    latencies, demands, left = [], [], []
    for call in calls:
        # What runs beside it is on the graph, so its own price is that of a group alone.
        group = replace(Group.of(call.ranks), concurrent=1)
        if max(call.ranks) >= cluster.num_gpus:
            raise InputError(f"rank {max(call.ranks)} is beyond the {cluster.num_gpus} GPUs of {cluster.name}")
        cost = price(call.operation, call.size_bytes, cluster, group)
        demand = _demand(cluster, graph, call, group)
        alone = fair_rates([demand], graph)[0] if demand else float("inf")
        # The wire gives the time of the busiest link; what the price adds to it is there whoever else runs.
        seconds = call.size_bytes / alone
        part = max(cost.bandwidth_s, seconds)
        demands.append({link: load * part / seconds for link, load in demand.items()})
        latencies.append(max(cost.time_s - cost.bandwidth_s, 0.0))
        left.append(call.size_bytes)
    return [latency + seconds for latency, seconds in zip(latencies, _finish(left, demands, graph), strict=True)]


def fair_rates(demands: Sequence[Mapping[Link, float]], graph: nx.Graph[Any]) -> list[float]:
    """Max-min fair rates, bytes of the buffer per second, of collectives that load links in fixed proportions.

    Parameters
    ----------
    demands : sequence of mapping
        Bytes over each link for each byte of the buffer.
    graph : networkx.Graph
        The topology with the bandwidth of every link.
    """
    room: dict[Link, float] = {
        link: graph.edges[link]["bandwidth"] for demand in demands for link, load in demand.items() if load > 0
    }
    rates = [0.0] * len(demands)
    growing = {i for i, demand in enumerate(demands) if any(load > 0 for load in demand.values())}
    for i in set(range(len(demands))) - growing:
        rates[i] = float("inf")
    while growing:
        load: dict[Link, float] = defaultdict(float)
        for i in growing:
            for link, share in demands[i].items():
                if share > 0:
                    load[link] += share
        full, step = min(((link, room[link] / share) for link, share in load.items()), key=lambda pair: pair[1])
        for i in growing:
            rates[i] += step
        for link, share in load.items():
            room[link] = max(room[link] - step * share, 0.0)
        tight = {link for link, share in load.items() if room[link] <= 1e-9 * graph.edges[link]["bandwidth"]} | {full}
        growing = {i for i in growing if not any(demands[i].get(link, 0.0) > 0 for link in tight)}
    return rates


def imbalance(received_bytes: Sequence[float]) -> float:
    """How much longer an all-to-all takes than an even one: the most that a rank receives over the mean.

    An expert that many tokens choose makes all wait for it. Multiply the bandwidth part of the price by this.

    >>> imbalance([1.0, 1.0, 2.0])
    1.5
    """
    values = list(received_bytes)
    if not values or min(values) < 0 or max(values) == 0:
        raise InputError("received_bytes must hold the bytes of every rank, none below zero and one above")
    return max(values) * len(values) / sum(values)


def overlap_slowdown(cluster: Cluster) -> float:
    """Time of kernels beside a collective over their time alone, from the scale-up link class.

    >>> from simllm.hardware.cluster import load_cluster
    >>> overlap_slowdown(load_cluster("dgx-a100", 8))
    1.126
    """
    from simllm.hardware.links import load_link

    figure = load_link(cluster.scaleup_link).overlap
    if figure is None:
        raise UnsupportedError(f"nobody measured kernels beside collectives over {cluster.scaleup_link}")
    return 1 + figure.si


def _demand(cluster: Cluster, graph: nx.Graph[Any], call: Call, group: Group) -> dict[Link, float]:
    """Bytes over every link for each byte of the buffer, by rings or direct messages."""
    n = group.size
    if n == 1:
        return {}
    view = fabric(cluster, group)
    g = view.domain.most
    if view.domain.least != g:
        raise UnsupportedError(
            f"{n} ranks with stride {group.stride} fall unevenly on the domains of {cluster.name}; use even groups"
        )
    schedule: list[Phase]
    if call.operation == "all_to_all":
        schedule = all_to_all_schedule(n)
    elif call.operation == "broadcast":
        schedule = broadcast_schedule(n, g)
    elif call.operation in ("all_reduce", "all_gather", "reduce_scatter"):
        passes = 2 if call.operation == "all_reduce" else 1
        inside_mesh = cluster.scaleup_topology in ("mesh", "cube-mesh") and view.out is None
        schedule = exchange_schedule(n, passes) if inside_mesh else ring_schedule(n, g, passes)
    else:
        raise UnsupportedError(f"{call.operation} beside other collectives is not modelled; price it alone")
    summed: dict[Link, float] = defaultdict(float)
    phases: list[Loads] = link_loads(graph, schedule, sorted(call.ranks), cluster.gpus_per_domain)
    for loads in phases:
        for link, load in loads.items():
            summed[link] += load
    return summed


def _finish(sizes: Sequence[float], demands: Sequence[Mapping[Link, float]], graph: nx.Graph[Any]) -> list[float]:
    """When each is done, with the rates shared again each time that one is."""
    left = dict(enumerate(sizes))
    done = [0.0] * len(sizes)
    now = 0.0
    while left:
        order = sorted(left)
        rates = dict(zip(order, fair_rates([demands[i] for i in order], graph), strict=True))
        step = min(left[i] / rates[i] for i in order)
        now += step
        for i in order:
            left[i] -= step * rates[i]
            if left[i] <= 1e-9 * sizes[i]:
                done[i] = now
                del left[i]
    return done
