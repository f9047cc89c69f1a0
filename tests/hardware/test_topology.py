"""The topology graph: counts by hand and from published tables, bandwidths, cuts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.hardware import Cluster, build_topology, list_profiles, load_cluster


def kinds(graph: nx.Graph[Any]) -> dict[str, int]:
    return dict(Counter(kind for _, kind in graph.nodes(data="kind")))


def levels(graph: nx.Graph[Any]) -> dict[str, int]:
    return dict(Counter(level for _, _, level in graph.edges(data="level")))


def whole(name: str, domains: int) -> Cluster:
    """So many domains of a system, or all it has."""
    one = load_cluster(name, 1)
    wanted = domains * min(one.domain_gpus, 1024)
    return load_cluster(name, min(one.max_gpus or wanted, wanted))


def cut(graph: nx.Graph[Any], side: set[Any]) -> float:
    return float(nx.cut_size(graph, side, weight="bandwidth"))


def max_flow(graph: nx.Graph[Any], sources: set[Any], sinks: set[Any]) -> float:
    """What one set of vertices can send to another, every link working at once."""
    flow = nx.DiGraph()
    for a, b, bandwidth in graph.edges(data="bandwidth"):
        flow.add_edge(a, b, bandwidth=bandwidth)
        flow.add_edge(b, a, bandwidth=bandwidth)
    flow.add_edges_from(("source", vertex) for vertex in sources)
    flow.add_edges_from((vertex, "sink") for vertex in sinks)
    return float(nx.maximum_flow_value(flow, "source", "sink", capacity="bandwidth"))


def test_two_dgx_h100_by_hand() -> None:
    graph = build_topology(load_cluster("dgx-h100", 16))
    # 2 nodes: 16 GPUs on 2 x 4 NVSwitches, a PCIe switch and a NIC for each; 8 rails, whose 16 uplinks fit one spine
    assert kinds(graph) == {"gpu": 16, "nvswitch": 8, "pcie": 16, "nic": 16, "leaf": 8, "spine": 1}
    assert levels(graph) == {"scaleup": 16 * 4, "host": 16 + 16, "nic": 16, "leaf": 8}
    assert graph.edges[("gpu", 9), ("nvswitch", 1, 3)] == {"bandwidth": 112.5e9, "link": "nvlink4", "level": "scaleup"}
    assert graph.edges[("gpu", 9), ("pcie", 1, 1)] == {"bandwidth": 63e9, "link": "pcie5", "level": "host"}
    assert graph.edges[("nic", 1, 1), ("leaf", 0, 1)] == {"bandwidth": 50e9, "link": "infiniband", "level": "nic"}
    # two nodes' share of the rail's uplinks
    assert graph.edges[("leaf", 0, 1), ("spine", 0, 0)]["bandwidth"] == 100e9
    # equal local ranks meet at their rail's leaf, unequal ones above it
    assert nx.shortest_path_length(graph, ("nic", 0, 3), ("nic", 1, 3)) == 2
    assert nx.shortest_path_length(graph, ("nic", 0, 3), ("nic", 1, 4)) == 4
    assert graph.nodes["gpu", 0] == {"kind": "gpu", "level": 0}


@pytest.mark.parametrize(
    ("name", "nodes", "leaf", "spine", "core"),
    [  # NVIDIA DGX SuperPOD reference architectures, tables of switch counts: DGX B200 (NDR), DGX B300 (XDR)
        ("dgx-b200", 64, 16, 8, 0),
        ("dgx-b200", 128, 32, 16, 0),
        ("dgx-b200", 256, 64, 32, 0),
        ("dgx-b200", 512, 128, 128, 64),
        ("dgx-b200", 1024, 256, 256, 128),
        ("dgx-b200", 2048, 512, 512, 256),
        ("dgx-b300", 72, 8, 4, 0),
        ("dgx-b300", 144, 16, 8, 0),
        ("dgx-b300", 1296, 144, 72, 0),
    ],
)
def test_switch_counts_of_the_reference_architectures(name: str, nodes: int, leaf: int, spine: int, core: int) -> None:
    found = kinds(build_topology(load_cluster(name, nodes * 8)))
    assert (found["leaf"], found["spine"], found.get("core", 0)) == (leaf, spine, core)


def test_16384_gpus() -> None:
    graph = build_topology(load_cluster("dgx-h100", 16384))
    assert kinds(graph) == {
        "gpu": 16384, "nvswitch": 8192, "pcie": 16384, "nic": 16384, "leaf": 512, "spine": 512, "core": 256,
    }  # fmt: skip
    # a leaf of 32 spines, a spine of 32 leaves and, in its plane, of 8 cores with 4 links each
    assert levels(graph) == {"scaleup": 65536, "host": 32768, "nic": 16384, "leaf": 512 * 32, "spine": 512 * 8}
    assert graph.edges[("spine", 3, 7), ("core", 7, 2)]["bandwidth"] == pytest.approx(4 * 50e9)
    assert nx.is_connected(graph)


@pytest.mark.parametrize("name", list_profiles("systems"))
def test_every_system_carries_what_its_profile_says(name: str) -> None:
    cluster = whole(name, 3)
    graph = build_topology(cluster)
    assert nx.is_connected(graph)
    assert kinds(graph)["gpu"] == cluster.num_gpus
    assert all(attributes["bandwidth"] > 0 for _, _, attributes in graph.edges(data=True))
    if cluster.scaleup_topology != "torus" and cluster.gpus_per_domain == cluster.domain_gpus:
        for gpu in range(0, cluster.num_gpus, 5):
            out = sum(
                attributes["bandwidth"]
                for _, _, attributes in graph.edges(("gpu", gpu), data=True)
                if attributes["level"] == "scaleup" and attributes["link"] == cluster.scaleup_link
            )
            assert out == pytest.approx(cluster.scaleup_bandwidth)
    if cluster.scaleout_bandwidth_per_node is not None:
        for node in (0, cluster.num_nodes - 1):
            nics = [
                (near, far) for near, far, level in graph.edges(data="level") if level == "nic" and far[0] == "leaf"
            ]
            carried = sum(graph.edges[near, far]["bandwidth"] for near, far in nics if near[1] == node)
            assert carried == pytest.approx(cluster.scaleout_bandwidth_per_node)
            # nothing between the devices and their NICs is slower than the NICs
            gpus = {("gpu", node * cluster.gpus_per_node + i) for i in range(cluster.gpus_per_node)}
            host = graph.edge_subgraph(edge for edge in graph.edges if graph.edges[edge]["level"] == "host")
            assert max_flow(host, gpus, {near for near, _ in nics if near[1] == node}) >= carried * (1 - 1e-9)


def test_nvl72_is_one_domain_of_18_switch_chips() -> None:
    graph = build_topology(load_cluster("gb200-nvl72", 144))
    assert kinds(graph)["nvswitch"] == 2 * 18
    assert graph.degree(("nvswitch", 0, 0)) == 72
    assert graph.edges[("gpu", 71), ("nvswitch", 0, 17)]["bandwidth"] == 50e9
    assert nx.shortest_path_length(graph, ("gpu", 0), ("gpu", 71)) == 2
    # 36 trays of 4 NICs on 4 rails; 36 trays need a second leaf group
    assert (kinds(graph)["nic"], kinds(graph)["leaf"]) == (144, 8)


def test_partly_filled_domains_are_even() -> None:
    graph = build_topology(load_cluster("gb200-nvl72", 128))
    assert [graph.degree(("nvswitch", domain, 0)) for domain in (0, 1)] == [64, 64]


def test_cube_mesh_of_a_dgx_1() -> None:
    graph = build_topology(load_cluster("dgx-1v", 8))
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (8, 16)
    assert graph.edges[("gpu", 0), ("gpu", 3)]["bandwidth"] == 50e9
    assert graph.edges[("gpu", 0), ("gpu", 1)]["bandwidth"] == 25e9
    # four links of each device stay in its half of the cube; 0-4 and 1-5 are double, 2-6 and 3-7 single
    assert not graph.has_edge(("gpu", 0), ("gpu", 5))
    assert cut(graph, {("gpu", gpu) for gpu in range(4)}) == 6 * 25e9
    quad = build_topology(load_cluster("dgx-1v", 4))
    assert (quad.number_of_nodes(), quad.number_of_edges()) == (4, 6)


def test_meshes() -> None:
    graph = build_topology(load_cluster("mi300x-platform", 8))
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (8, 28)
    assert graph.edges[("gpu", 0), ("gpu", 7)]["bandwidth"] == 64e9
    # a job on part of the board has the links between its own devices, as wide as ever
    assert build_topology(load_cluster("mi300x-platform", 2)).edges[("gpu", 0), ("gpu", 1)]["bandwidth"] == 64e9
    islands = build_topology(load_cluster("atlas-800-9000", 8))
    assert not islands.has_edge(("gpu", 3), ("gpu", 4))
    assert islands.edges[("gpu", 0), ("gpu", 3)] == {"bandwidth": 30e9, "link": "hccs", "level": "scaleup"}
    assert islands.edges[("gpu", 3), ("host", 0)] == {"bandwidth": 31.5e9, "link": "pcie4", "level": "scaleup"}


def test_pcie_box() -> None:
    graph = build_topology(load_cluster("tinybox-green", 6))
    assert kinds(graph) == {"gpu": 6, "host": 1}
    assert {attributes["bandwidth"] for _, _, attributes in graph.edges(data=True)} == {31.5e9}


@pytest.mark.parametrize(
    ("name", "chips", "edges", "bisection"),
    [
        # 16 x 16, closed both ways: 2 links a chip of 50 GB/s each way; Google states 1.6 TB/s for the bisection
        ("tpu-v5e-pod", 256, 512, 1.6e12),
        ("tpu-v6e-pod", 256, 512, 3.2e12),
        # 8 x 16: only the axis of 16 is closed: 128 + 7 * 16 links, two cuts of 8 links through the ring
        ("tpu-v5e-pod", 128, 128 + 112, 2 * 8 * 50e9),
        # 4 x 4 x 4, closed all ways: 3 links a chip, two cuts of 16 links of 50 GB/s
        ("tpu-v4-pod", 64, 192, 2 * 16 * 50e9),
        # 2 x 2 x 4: closed only along the axis of 4: 16 + 8 + 8 links
        ("tpu-v4-pod", 16, 16 + 8 + 8, 2 * 4 * 50e9),
    ],
)
def test_tori(name: str, chips: int, edges: int, bisection: float) -> None:
    cluster = load_cluster(name, chips)
    graph = build_topology(cluster)
    torus = graph.edge_subgraph(edge for edge in graph.edges if graph.edges[edge]["level"] == "scaleup")
    assert (torus.number_of_nodes(), torus.number_of_edges()) == (chips, edges)
    long_axis = cluster.torus_shape[-1]
    half = {("gpu", chip) for chip in range(chips) if chip % long_axis < long_axis // 2}
    assert cut(torus, half) == pytest.approx(bisection)


def test_slices_of_a_tpu_pod_meet_over_the_data_centre_network() -> None:
    graph = build_topology(load_cluster("tpu-v5e-pod", 512))
    ici = graph.edge_subgraph(edge for edge in graph.edges if graph.edges[edge]["link"] == "ici")
    assert nx.number_connected_components(ici) == 2
    assert nx.is_connected(graph)


def test_taper_of_meta_24k_by_cut() -> None:
    cluster = load_cluster("meta-grand-teton", 2 * 3072)
    graph = build_topology(cluster)
    core = sum(
        bandwidth for near, far, bandwidth in graph.edges(data="bandwidth") if {near[:2], far[:2]} & {("spine", 0)}
    )
    into_leaves = sum(
        bandwidth
        for near, far, bandwidth in graph.edges(data="bandwidth")
        if near[0] == "leaf" and far[:2] == ("spine", 0)
    )
    assert into_leaves == pytest.approx(3072 * 50e9)
    assert core - into_leaves == pytest.approx(3072 * 50e9 / 7)
    # inside one pod nothing is tapered
    inside = build_topology(load_cluster("meta-grand-teton", 3072))
    assert "core" not in kinds(inside)


def test_min_cut_between_pods_and_leaves_respects_the_taper(lab: Path) -> None:
    graph = build_topology(load_cluster(lab, 32))
    # 16 nodes of 2 GPUs on one 12.5 GB/s port: 4 leaves of 4 nodes at 2:1, 2 pods of 8 nodes at 4:1;
    # a pod's leaves have 4 uplinks, and of a spine's 8 ports 8 * 2/3 face down, so one spine a pod and one core do
    assert kinds(graph) == {"gpu": 32, "host": 16, "nic": 16, "leaf": 4, "spine": 2, "core": 1}

    def gpus(*bounds: int) -> set[Any]:
        return {("gpu", gpu) for gpu in range(*bounds)}

    node = 12.5e9
    assert max_flow(graph, gpus(2), gpus(2, 4)) == pytest.approx(node)
    assert max_flow(graph, gpus(8), gpus(8, 16)) == pytest.approx(4 * node / 2)
    assert max_flow(graph, gpus(16), gpus(16, 32)) == pytest.approx(8 * node / 4)


@settings(max_examples=15, deadline=None)
@given(nodes=st.integers(1, 12), more=st.integers(0, 4))
def test_a_larger_job_never_has_a_narrower_network(nodes: int, more: int) -> None:
    """What one half of the nodes can send to the other grows with the nodes, also across part-filled leaves."""

    def bisection(count: int) -> float:
        graph = build_topology(load_cluster("dgx-a100", 16 * count))
        sides = [
            {("nic", node, nic) for node in side for nic in range(8)}
            for side in (range(count), range(count, 2 * count))
        ]
        network = graph.edge_subgraph(
            edge for edge in graph.edges if graph.edges[edge]["level"] not in ("scaleup", "host")
        )
        return max_flow(network, *sides)

    assert bisection(nodes) == pytest.approx(nodes * 200e9)
    assert bisection(nodes + more) >= bisection(nodes)
