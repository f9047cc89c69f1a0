"""The second derivation: messages of each algorithm routed over the topology against its closed form."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import msgspec
import pytest

from simllm.errors import InputError
from simllm.hardware.cluster import Cluster, load_cluster
from simllm.hardware.fabric import CubeMesh
from simllm.hardware.links import Link
from simllm.hardware.profiles import figures_of
from simllm.hardware.topology import build_topology
from simllm.network import Group
from simllm.network.calibrate import with_figures
from simllm.network.fabric import Fabric, fabric
from simllm.network.loads import Loads, link_loads, load_time_s
from simllm.network.price import choices
from simllm.network.schedules import (
    Phase,
    all_to_all_schedule,
    broadcast_schedule,
    collnet_schedule,
    cube_rings,
    double_tree,
    exchange_schedule,
    hierarchical_schedule,
    nvls_schedule,
    pat_schedule,
    pxn_schedule,
    ring_schedule,
    torus_schedule,
    tree_schedule,
)

SYSTEMS = [
    ("dgx-h100", 2),
    ("dgx-h100", 8),
    ("dgx-h100", 16),
    ("dgx-h100", 32),
    ("dgx-h100", 64),
    ("dgx-h100", 256),
    ("dgx-a100", 32),
    ("dgx-2", 16),
    ("dgx-1v", 8),
    ("dgx-1v", 16),
    ("aws-p3dn", 8),
    ("abci-v", 16),
    ("aws-p4d", 32),
    ("gb200-nvl72", 72),
    ("gb200-nvl72", 144),
    ("mi300x-platform", 8),
    ("mi300x-platform", 32),
    ("hls-gaudi2", 8),
    ("tinybox-green", 6),
    ("meta-grand-teton", 64),
    ("tpu-v5e-pod", 256),
    ("tpu-v5p-pod", 64),
]


def _perfect(link: Link | None) -> Link | None:
    """The class with the whole wire for every message and no copies."""
    if link is None:
        return None
    figures = figures_of(link)
    whole = {path: 1.0 for path in figures if path.endswith("efficiency")}
    none = {path: 0.0 for path in figures if path.endswith("copy")}
    return with_figures(
        link, {path: msgspec.structs.replace(figures[path], value=value) for path, value in (whole | none).items()}
    )


@lru_cache(maxsize=64)
def _case(name: str, gpus: int) -> tuple[Cluster, Any, Fabric]:
    cluster = load_cluster(name, gpus)
    view = fabric(cluster, Group(size=gpus))
    up = _perfect(view.up)
    assert up is not None
    return cluster, build_topology(cluster), replace(view, up=up, out=_perfect(view.out), paired=False)


def _schedules(cluster: Cluster, view: Fabric) -> dict[tuple[str, str], list[Phase]]:
    """What can be routed on a system, by operation and algorithm."""
    n, g = view.size, view.domain.most
    rails = int(view.up.rails.value) if view.up.rails and view.out else None
    channels = min(g, rails) if rails else None
    wiring = cluster.scaleup_fabric
    if view.grid is not None:
        return {
            ("all_reduce", "torus"): torus_schedule(cluster.torus_shape, 2),
            ("all_gather", "torus"): torus_schedule(cluster.torus_shape, 1),
        }
    if isinstance(wiring, CubeMesh):
        if view.out is not None:
            return {("all_to_all", "pairwise"): all_to_all_schedule(n), ("all_to_all", "pxn"): pxn_schedule(n, g)}
        rings = {(op, "ring"): cube_rings(wiring.wires, n, k) for op, k in (("all_reduce", 2), ("all_gather", 1))}
        return rings | {("all_to_all", "pairwise"): all_to_all_schedule(n)}
    mesh = cluster.scaleup_topology == "mesh"
    found = {}
    for op, k in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
        found[op, "ring"] = exchange_schedule(n, k) if mesh and view.out is None else ring_schedule(n, g, k, channels)
    if n <= 72:
        found["all_to_all", "pairwise"] = all_to_all_schedule(n)
    if not mesh and not channels:
        found["broadcast", "ring"] = broadcast_schedule(n, g)
    if view.out is not None:
        found["all_reduce", "tree"] = tree_schedule(n, g, channels)
        if n <= 72:
            found["all_to_all", "pxn"] = pxn_schedule(n, g)
        if not mesh and not channels:
            found["all_reduce", "hierarchical"] = hierarchical_schedule(n, g, 2)
            found["all_gather", "hierarchical"] = hierarchical_schedule(n, g, 1)
    if view.up.switch is not None and g >= view.up.switch.minimum_group.value:
        found["all_reduce", "nvls_tree" if view.out else "nvls"] = nvls_schedule(n, g, channels)
    if view.out is not None and view.out.switch is not None and view.up.switch is not None and not channels:
        found["all_reduce", "collnet"] = collnet_schedule(n, g)
    return found


@pytest.mark.parametrize(("name", "gpus"), SYSTEMS)
def test_loads_take_as_long_as_the_closed_form(name: str, gpus: int) -> None:
    cluster, graph, view = _case(name, gpus)
    found = _schedules(cluster, view)
    assert found
    for (operation, algorithm), schedule in found.items():
        terms = choices(operation, view, algorithm)
        if not terms:  # no tree over this network
            continue
        loads = link_loads(graph, schedule, range(gpus), cluster.gpus_per_domain)
        assert load_time_s(graph, loads) == pytest.approx(terms[-1].s_per_byte, rel=1e-9), (operation, algorithm)
        _check_conservation(schedule, loads)
        if algorithm not in ("nvls", "nvls_tree", "collnet"):
            sent = sum(sum(phase.values()) for phase in schedule) / gpus
            assert sent == pytest.approx(terms[-1].scaleup_bytes + terms[-1].scaleout_bytes), (operation, algorithm)
        _check_bound(operation, view, schedule)


def _check_conservation(schedule: list[Phase], phases: list[Loads]) -> None:
    """Links, switches and NICs hand on what they take; GPUs send and take what the messages say."""
    for phase, loads in zip(schedule, phases, strict=True):
        balance: dict[Any, float] = defaultdict(float)
        for (a, b), part in loads.items():
            balance[a] -= part
            balance[b] += part
        wanted: dict[Any, float] = defaultdict(float)
        for (source, target), part in phase.items():
            wanted[source] -= part
            wanted[target] += part
        for vertex, surplus in balance.items():
            if vertex[0] == "gpu":
                assert surplus == pytest.approx(wanted[vertex[1]], abs=1e-9)
            elif not any(isinstance(end, tuple) for message in phase for end in message):
                assert surplus == pytest.approx(0, abs=1e-9)


def _check_bound(operation: str, view: Fabric, schedule: list[Phase]) -> None:
    """GPUs and domains take in what they do not have and send out what only they have."""
    n, g, blocks = view.size, view.domain.most, view.domain.blocks
    sent: dict[Any, float] = defaultdict(float)
    received: dict[Any, float] = defaultdict(float)
    for phase in schedule:
        for (source, target), part in phase.items():
            # Of a GPU, and of a domain where the message leaves it.
            ends = [end if isinstance(end, int) else None for end in (source, target)]
            sent[ends[0]] += part
            received[ends[1]] += part
            domains = [None if end is None else end // g for end in ends]
            if domains[0] != domains[1] and not any(
                isinstance(x, tuple) and x[0] == "switch" for x in (source, target)
            ):
                sent["domain", domains[0]] += part
                received["domain", domains[1]] += part
    for rank in range(n):
        if operation in ("all_reduce", "reduce_scatter", "all_to_all"):
            assert sent[rank] >= (n - 1) / n - 1e-9
        if operation in ("all_reduce", "all_gather", "all_to_all") or (operation == "broadcast" and rank):
            assert received[rank] >= (n - 1) / n - 1e-9
    for domain in range(blocks if blocks > 1 else 0):
        if operation in ("all_reduce", "reduce_scatter"):
            assert sent["domain", domain] >= (blocks - 1) / blocks - 1e-9
        if operation in ("all_reduce", "all_gather"):
            assert received["domain", domain] >= (blocks - 1) / blocks - 1e-9


def test_all_to_all_of_a_cube_mesh_is_above_every_cut() -> None:
    _, graph, view = _case("dgx-1v", 8)
    terms = choices("all_to_all", view, "pairwise")[-1]
    (loads,) = link_loads(graph, all_to_all_schedule(8), range(8), 8)
    worst = 0.0
    for size in range(1, 5):
        for part in combinations(range(8), size):
            across = sum(edge["bandwidth"] for a, b, edge in graph.edges(data=True) if (a[1] in part) != (b[1] in part))
            worst = max(worst, size * (8 - size) / 8 / across)
    # The halves of the cube: 16 slots of an eighth each way over 6 links of 25 GB/s.
    assert worst == pytest.approx(16 / 8 / 150e9)
    assert terms.s_per_byte >= worst
    # The one link from 2 to 6 carries their own slot, parts of those from 2 to 4, 5, 7 and of those from 0, 1, 3 to 6.
    slots = 1 + (1 / 2 + 1 / 3 + 1 / 3) + (1 / 3 + 1 / 2 + 2 / 3)
    assert loads[("gpu", 2), ("gpu", 6)] == pytest.approx(slots / 8)
    assert terms.s_per_byte == pytest.approx(slots / 8 / 25e9, rel=1e-9)


def test_pat_sends_each_part_once() -> None:
    for n in (2, 3, 8, 13):
        (phase,) = pat_schedule(n)
        sent: dict[Any, float] = defaultdict(float)
        for (source, _), part in phase.items():
            sent[source] += part
        assert all(part == pytest.approx((n - 1) / n) for part in sent.values())
    cluster, graph, _ = _case("dgx-h100", 64)
    rails = fabric(cluster, Group(size=8, stride=8))
    (terms,) = choices("all_gather", rails, "pat")
    loads = link_loads(graph, pat_schedule(8), range(0, 64, 8), 8)
    assert load_time_s(graph, loads) == pytest.approx(terms.s_per_byte * 0.75)


def test_double_trees() -> None:
    """Both span all domains, and no domain but one has children in both."""
    for n in (2, 3, 4, 7, 8, 16, 33):
        trees = double_tree(n)
        inner = []
        for edges in trees:
            assert len(edges) == n - 1
            assert len({child for child, _ in edges}) == n - 1
            inner.append({parent for _, parent in edges})
            assert max(sum(parent == p for _, p in edges) for _, parent in edges) <= 2
        assert len(inner[0] & inner[1]) <= 1 or n == 2


def test_members_that_nothing_joins() -> None:
    _, graph, _ = _case("dgx-h100", 16)
    cut = graph.copy()
    cut.remove_nodes_from([vertex for vertex in graph if vertex[0] == "leaf"])
    with pytest.raises(InputError, match=r"no path joins .* in the topology of dgx-h100"):
        link_loads(cut, ring_schedule(16, 8, 2), range(16), 8)


def test_links_without_bandwidth() -> None:
    _, graph, _ = _case("dgx-h100", 8)
    dead = graph.copy()
    for edge in dead.edges:
        dead.edges[edge]["bandwidth"] = 0.0
    with pytest.raises(InputError, match="have no bandwidth; a link needs more than 0 bytes/s"):
        link_loads(dead, ring_schedule(8, 8, 2), range(8), 8)
