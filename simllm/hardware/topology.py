"""The topology graph: every device, switch and NIC of a cluster, with the bandwidth of each link.

Vertices are tuples that begin with their kind: ``("gpu", 12)``, ``("nvswitch", domain, i)``, ``("pcie", node, i)``,
``("host", node)``, ``("nic", node, i)``, ``("leaf", group, rail)``, ``("spine", pod, i)``, ``("core", plane, i)``.
A vertex has the attributes ``kind`` and ``level`` (0 for devices, rising towards the core); an edge has ``bandwidth``
(bytes/s in each direction), ``link`` (the link class) and ``level``: ``scaleup``, ``host``, ``nic``, ``leaf``
(leaf to spine) or ``spine`` (spine to core).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

from simllm.hardware.cluster import Cluster
from simllm.hardware.fabric import CubeMesh, FatTree, Mesh, NVSwitch, PCIe, Torus

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["build_topology"]

Vertex = tuple[str, int] | tuple[str, int, int]
Edge = tuple[Vertex, Vertex, float, str]

_LEVELS = {"gpu": 0, "nvswitch": 1, "pcie": 1, "host": 1, "nic": 2, "leaf": 3, "spine": 4, "core": 5}


def build_topology(cluster: Cluster) -> nx.Graph[Any]:
    """The graph of a cluster.

    Switch counts follow from the fabric's facts (switch ports, nodes of a leaf group and of a pod, oversubscription)
    as in the tables of the DGX SuperPOD reference architectures: the uplinks of a level are spread evenly over the
    fewest switches of the next level that have ports for them. A cluster that fills only part of a leaf group or pod
    has its share of the uplinks.

    Parameters
    ----------
    cluster : Cluster
        From `simllm.hardware.cluster.load_cluster` or `make_cluster`.

    Returns
    -------
    networkx.Graph
        Undirected; each edge carries its bandwidth in both directions at once.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> graph = build_topology(load_cluster("dgx-h100", 16))
    >>> graph.edges[("nic", 1, 3), ("leaf", 0, 3)]["bandwidth"]
    50000000000.0
    """
    import networkx as nx

    graph: nx.Graph[Any] = nx.Graph(name=cluster.name)
    for gpu in range(cluster.num_gpus):
        graph.add_node(("gpu", gpu), kind="gpu", level=0)
    parts = [("scaleup", _scaleup(cluster))]
    if cluster.scaleout_fabric is not None and cluster.scaleout_link is not None and cluster.num_nodes > 1:
        tree, link = cluster.scaleout_fabric, cluster.scaleout_link
        parts += [("host", _host(cluster, link)), ("nic", _nics(cluster, tree, link)), *_tree(cluster, tree, link)]
    for level, edges in parts:
        graph.add_edges_from(
            (a, b, {"bandwidth": bandwidth, "link": link, "level": level}) for a, b, bandwidth, link in edges
        )
    for vertex, attributes in graph.nodes(data=True):
        attributes["kind"] = vertex[0]
        attributes["level"] = _LEVELS[vertex[0]]
    return graph


def _scaleup(cluster: Cluster) -> Iterator[Edge]:
    """The links inside every scale-up domain."""
    size, link = cluster.gpus_per_domain, cluster.scaleup_link
    for domain, first in enumerate(range(0, cluster.num_gpus, size)):
        gpus = range(first, min(first + size, cluster.num_gpus))
        match cluster.scaleup_fabric:
            case NVSwitch(switches=switches):
                count = int(switches.value)
                for i, gpu in product(range(count), gpus):
                    yield ("nvswitch", domain, i), ("gpu", gpu), cluster.scaleup_bandwidth / count, link
            case Mesh(island=island):
                yield from _mesh(cluster, gpus, int(island.value) if island else cluster.domain_gpus)
            case CubeMesh(wires=wires, links_per_device=links):
                for a, b, count in wires:
                    if a < len(gpus) and b < len(gpus):
                        yield ("gpu", gpus[a]), ("gpu", gpus[b]), cluster.scaleup_bandwidth * count / links, link
            case PCIe():
                for gpu in gpus:
                    yield ("host", gpu // cluster.gpus_per_node), ("gpu", gpu), cluster.scaleup_bandwidth, link
            case Torus() as torus:
                yield from _torus(cluster, torus, gpus)


def _mesh(cluster: Cluster, gpus: range, island: int) -> Iterator[Edge]:
    for start in range(gpus.start, gpus.stop, island):
        for a, b in combinations(range(start, min(start + island, gpus.stop)), 2):
            yield ("gpu", a), ("gpu", b), cluster.scaleup_bandwidth / (island - 1), cluster.scaleup_link
    if len(gpus) > island:
        for gpu in gpus:
            yield ("host", gpu // cluster.gpus_per_node), ("gpu", gpu), *_pcie(cluster)


def _torus(cluster: Cluster, torus: Torus, gpus: range) -> Iterator[Edge]:
    """Row-major in the rising axes of the slice, so that neighbouring ranks are neighbours along the longest axis."""
    shape = cluster.torus_shape
    bandwidth = cluster.scaleup_bandwidth / (2 * len(shape))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for place, gpu in enumerate(gpus):
        for axis, (length, stride) in enumerate(zip(shape, strides, strict=True)):
            at = place // stride % length
            if at + 1 < length:
                yield ("gpu", gpu), ("gpu", gpu + stride), bandwidth, cluster.scaleup_link
            elif torus.wraps(shape[axis]):
                yield ("gpu", gpu), ("gpu", gpu - at * stride), bandwidth, cluster.scaleup_link


def _pcie(cluster: Cluster) -> tuple[float, str]:
    """A device's bandwidth and link to its host; where the profile states none, that of its scale-up links."""
    card = cluster.accelerator
    if card.pcie_bandwidth is None or card.pcie_link is None:
        return cluster.scaleup_bandwidth, cluster.scaleup_link
    return card.pcie_bandwidth, card.pcie_link


def _ports(cluster: Cluster) -> tuple[int, float]:
    """NICs of a node and the bandwidth of one."""
    return cluster.nics_per_node, (cluster.scaleout_bandwidth_per_node or 0.0) / cluster.nics_per_node


def _affinity(cluster: Cluster) -> int:
    """Groups of devices and NICs of a node that share a PCIe switch: as many as divide both."""
    return math.gcd(cluster.gpus_per_node, cluster.nics_per_node)


def _host(cluster: Cluster, link: str) -> Iterator[Edge]:
    """Between devices and the NICs of their node."""
    nics, bandwidth = _ports(cluster)
    groups = _affinity(cluster)
    gpus_each, nics_each = cluster.gpus_per_node // groups, nics // groups
    for node in range(cluster.num_nodes):
        first = node * cluster.gpus_per_node
        for group in range(groups):
            gpus = range(first + group * gpus_each, first + (group + 1) * gpus_each)
            ports = range(group * nics_each, (group + 1) * nics_each)
            if isinstance(cluster.scaleup_fabric, PCIe):
                for nic in ports:
                    yield ("host", node), ("nic", node, nic), bandwidth, link
            elif cluster.nic_attach == "accelerator":
                for gpu, nic in product(gpus, ports):
                    yield ("gpu", gpu), ("nic", node, nic), bandwidth, link
            else:
                for gpu in gpus:
                    yield ("gpu", gpu), ("pcie", node, group), *_pcie(cluster)
                for nic in ports:
                    yield ("pcie", node, group), ("nic", node, nic), bandwidth, link


def _nics(cluster: Cluster, tree: FatTree, link: str) -> Iterator[Edge]:
    """From every NIC to its leaf: that of its rail in a rail-optimised tree, else that of its node."""
    nics, bandwidth = _ports(cluster)
    per_rail = nics // _affinity(cluster)
    nodes = int(tree.leaf.nodes.value)
    for node, nic in product(range(cluster.num_nodes), range(nics)):
        rail = nic // per_rail if tree.rail_optimised else 0
        yield ("nic", node, nic), ("leaf", node // nodes, rail), bandwidth, link


def _tree(cluster: Cluster, tree: FatTree, link: str) -> Iterator[tuple[str, Iterator[Edge]]]:
    """The levels above the leaf switches.

    Two levels reach every leaf while a spine has a port for each; beyond, or where pods are tapered, spines belong to
    pods and core switches join the i-th spines of all pods (a plane).
    """
    nics, port = _ports(cluster)
    ports = int(tree.switch_ports.value)
    group_nodes = int(tree.leaf.nodes.value)
    rails = _affinity(cluster) if tree.rail_optimised else 1
    leaf_ratio = tree.leaf.oversubscription.si
    groups = math.ceil(cluster.num_nodes / group_nodes)
    if groups * rails == 1:
        return
    pod_nodes, pod_ratio = cluster.num_nodes, leaf_ratio
    if tree.pod is not None and (groups * rails > ports or tree.pod.oversubscription.si > leaf_ratio):
        pod_nodes, pod_ratio = min(cluster.num_nodes, int(tree.pod.nodes.value)), tree.pod.oversubscription.si
    pods = math.ceil(cluster.num_nodes / pod_nodes)
    # Of a spine's ports, the share that faces down is r / (1 + r) where pods are tapered r:1 against their leaves.
    taper = pod_ratio / leaf_ratio
    down = ports if pods == 1 else ports * taper / (1 + taper)
    uplinks = pod_nodes * nics / leaf_ratio
    spines = max(1, math.ceil(uplinks / down))
    pod_of = [group * group_nodes // pod_nodes for group in range(groups)]

    def leaves() -> Iterator[Edge]:
        for group, rail in product(range(groups), range(rails)):
            nodes = min(group_nodes, cluster.num_nodes - group * group_nodes)
            bandwidth = nodes * nics * port / rails / leaf_ratio / spines
            for spine in range(spines):
                yield ("leaf", group, rail), ("spine", pod_of[group], spine), bandwidth, link

    def cores() -> Iterator[Edge]:
        each = max(1, math.ceil(pods * (pod_nodes * nics / pod_ratio / spines) / ports))
        for pod in range(pods):
            nodes = min(pod_nodes, cluster.num_nodes - pod * pod_nodes)
            bandwidth = nodes * nics * port / pod_ratio / spines / each
            for plane, core in product(range(spines), range(each)):
                yield ("spine", pod, plane), ("core", plane, core), bandwidth, link

    yield "leaf", leaves()
    if pods > 1:
        yield "spine", cores()
