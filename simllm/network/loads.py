"""Bytes over every link of the topology graph: the schedules of the algorithms routed over the wires.

A message between two GPUs of a domain takes the scale-up links, another one the NICs; where several shortest paths
exist it is spread evenly over them, which is what rails, adaptive routing and the many links of an NVSwitch amount to.
The time of a phase is that of its busiest link; it must be the bandwidth term of the closed form on a wire without
loss, and no algorithm can be below what has to leave each GPU and each domain.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError
from simllm.network.schedules import Endpoint, Phase

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Loads", "link_loads", "load_time_s", "phase_loads"]

Vertex = tuple[Any, ...]
#: Bytes over every link, in the direction from its first to its second vertex.
Loads = dict[tuple[Vertex, Vertex], float]


def link_loads(graph: nx.Graph[Any], schedule: Sequence[Phase], ranks: Sequence[int], domain: int) -> list[Loads]:
    """Bytes over the links of a topology in every phase, for each byte of the buffer.

    Parameters
    ----------
    graph : networkx.Graph
        From `simllm.hardware.topology.build_topology`.
    schedule : sequence of dict
        Messages between members of the group, from `simllm.network.schedules`.
    ranks : sequence of int
        The GPU of every member.
    domain : int
        GPUs of a scale-up domain.

    Raises
    ------
    InputError
        When no path joins two members, or a link on it has no bandwidth.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> from simllm.hardware.topology import build_topology
    >>> from simllm.network.schedules import ring_schedule
    >>> graph = build_topology(load_cluster("dgx-h100", 16))
    >>> (loads,) = link_loads(graph, ring_schedule(16, 8, 2), range(16), 8)
    >>> round(load_time_s(graph, [loads]) * 400e9, 6) == 2 * 15 / 16
    True
    """
    return [phase_loads(graph, phase, ranks, domain) for phase in schedule]


def phase_loads(graph: nx.Graph[Any], phase: Phase, ranks: Sequence[int], domain: int) -> Loads:
    """Bytes over the links in one phase."""
    loads: Loads = defaultdict(float)
    inside: dict[Vertex, dict[Vertex, float]] = defaultdict(dict)
    outside: dict[Vertex, dict[Vertex, float]] = defaultdict(dict)
    for (a, b), part in phase.items():
        if isinstance(a, tuple) or isinstance(b, tuple):
            _to_switch(graph, loads, a, b, ranks, part)
            continue
        gpu_a, gpu_b = ranks[a], ranks[b]
        kind = inside if gpu_a // domain == gpu_b // domain else outside
        kind["gpu", gpu_b]["gpu", gpu_a] = kind["gpu", gpu_b].get(("gpu", gpu_a), 0.0) + part
    for messages, scaleup in ((inside, True), (outside, False)):
        for target, sources in messages.items():
            _route(graph, loads, target, sources, scaleup)
    return loads


def load_time_s(graph: nx.Graph[Any], phases: Sequence[Mapping[tuple[Vertex, Vertex], float]]) -> float:
    """Seconds for each byte of the buffer on wires without loss: the sum over phases of their busiest link."""
    return sum(
        max((part / graph.edges[link]["bandwidth"] for link, part in loads.items()), default=0.0) for loads in phases
    )


def _neighbours(graph: nx.Graph[Any], vertex: Vertex, scaleup: bool) -> list[Vertex]:
    return [
        other
        for other, edge in graph.adj[vertex].items()
        if (edge["level"] == "scaleup") == scaleup or (scaleup and edge["level"] == "host" and vertex[0] == "host")
    ]


def _route(graph: nx.Graph[Any], loads: Loads, target: Vertex, sources: Mapping[Vertex, float], scaleup: bool) -> None:
    """Messages to one GPU along all shortest paths, in shares as the bandwidths of the next links."""
    # A PCIe box reaches its NICs through the links that its GPUs also use among each other.
    boxed = any(other[0] == "host" for other in graph.adj[target])
    distance: dict[Vertex, int] = {target: 0}
    queue = deque([target])
    missing = set(sources)
    while queue and missing:
        here = queue.popleft()
        missing.discard(here)
        if here[0] == "gpu" and here != target and not _forwards(graph, here):
            continue
        for other in graph.adj[here] if boxed else _neighbours(graph, here, scaleup):
            if other not in distance:
                distance[other] = distance[here] + 1
                queue.append(other)
    if missing:
        raise InputError(
            f"no path joins {min(missing)} and {target} in the topology of {graph.name}; every GPU of a group must be "
            "reachable over its scale-up links or its NICs"
        )
    flow: dict[Vertex, float] = defaultdict(float, sources)
    for here in sorted(distance, key=lambda vertex: -distance[vertex]):
        part = flow.get(here, 0.0)
        if here == target or part == 0.0:
            continue
        around = graph.adj[here] if boxed else _neighbours(graph, here, scaleup)
        nexts = [other for other in around if distance.get(other, -1) == distance[here] - 1]
        total = sum(graph.edges[here, other]["bandwidth"] for other in nexts)
        if total <= 0:
            raise InputError(
                f"the links of {here} towards {target} have no bandwidth; a link needs more than 0 bytes/s"
            )
        for other in nexts:
            share = part * graph.edges[here, other]["bandwidth"] / total
            loads[here, other] += share
            flow[other] += share


def _forwards(graph: nx.Graph[Any], gpu: Vertex) -> bool:
    """Whether a GPU passes messages on: on a torus and on cube meshes, where not all pairs have a wire."""
    return not any(other[0] in ("nvswitch", "host") for other in graph.adj[gpu])


def _to_switch(graph: nx.Graph[Any], loads: Loads, a: Endpoint, b: Endpoint, ranks: Sequence[int], part: float) -> None:
    """Between a GPU and the chips of its switch, or the first network switch of its rail."""
    up = isinstance(b, tuple)
    end, kind = (a, b) if up else (b, a)
    assert isinstance(end, int)
    assert isinstance(kind, tuple)
    path_kinds = ("nvswitch",) if kind[0] == "switch" else ("pcie", "nic", "leaf")
    level: dict[Vertex, float] = {("gpu", ranks[end]): part}
    for wanted in path_kinds:
        following: dict[Vertex, float] = defaultdict(float)
        for here, flow in level.items():
            nexts = [other for other in graph.adj[here] if other[0] == wanted]
            if not nexts and wanted == "pcie":
                following[here] += flow
                continue
            if not nexts:
                raise InputError(f"{here} of {graph.name} has no {wanted}; the algorithm needs one")
            total = sum(graph.edges[here, other]["bandwidth"] for other in nexts)
            for other in nexts:
                share = flow * graph.edges[here, other]["bandwidth"] / total
                loads[(here, other) if up else (other, here)] += share
                following[other] += share
        level = following
