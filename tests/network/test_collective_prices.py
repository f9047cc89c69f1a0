"""Laws that every price obeys: bounds, conservation, monotonicity, nccl-tests' definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware.cluster import Cluster, load_cluster
from simllm.network import OPERATIONS, Group, bus_factor, price, price_array, sweep
from simllm.network.fabric import fabric
from simllm.network.price import choices

CLUSTERS = {
    name: load_cluster(name, gpus)
    for name, gpus in {
        "dgx-h100": 256,
        "dgx-a100": 256,
        "gb200-nvl72": 144,
        "mi300x-platform": 64,
        "dgx-1v": 32,
        "meta-grand-teton": 6144,
        "tpu-v5p-pod": 256,
        "tpu-v5e-pod": 512,
        "hls-gaudi2": 32,
        "atlas-800t-a2": 64,
    }.items()
}

clusters = st.sampled_from(sorted(CLUSTERS)).map(CLUSTERS.__getitem__)
sizes = st.floats(min_value=1, max_value=2**40, allow_nan=False)
operations = st.sampled_from(OPERATIONS)


@st.composite
def placements(draw: st.DrawFn) -> tuple[Cluster, Group]:
    cluster = draw(clusters)
    stride = draw(st.sampled_from([1, 1, 2, 3, 4, 8, 16]))
    most = (cluster.num_gpus - 1) // stride + 1
    return cluster, Group(size=draw(st.integers(min_value=2, max_value=most)), stride=stride)


@given(placement=placements(), operation=operations, size=sizes, factor=st.floats(min_value=1, max_value=1e4))
@settings(max_examples=300, deadline=None)
def test_more_bytes_are_never_faster(
    placement: tuple[Cluster, Group], operation: str, size: float, factor: float
) -> None:
    cluster, group = placement
    less, more = price(operation, size, cluster, group), price(operation, size * factor, cluster, group)
    assert 0 < less.time_s <= more.time_s * (1 + 1e-12)


@given(
    placement=placements(),
    operation=operations,
    size=sizes,
    inside=st.floats(min_value=1, max_value=16),
    outside=st.floats(min_value=1, max_value=16),
)
@settings(max_examples=300, deadline=None)
def test_more_bandwidth_is_never_slower(
    placement: tuple[Cluster, Group], operation: str, size: float, inside: float, outside: float
) -> None:
    cluster, group = placement
    assert cluster.scaleout_bandwidth_per_node is not None
    faster = replace(
        cluster,
        scaleup_bandwidth=cluster.scaleup_bandwidth * inside,
        scaleout_bandwidth_per_node=cluster.scaleout_bandwidth_per_node * outside,
    )
    assert price(operation, size, faster, group).time_s <= price(operation, size, cluster, group).time_s * (1 + 1e-12)


@given(placement=placements(), size=sizes)
@settings(max_examples=200, deadline=None)
def test_no_algorithm_beats_the_wire(placement: tuple[Cluster, Group], size: float) -> None:
    """Every GPU has to send (n - 1)/n S to gather or scatter; its links carry no more than their bandwidth."""
    cluster, group = placement
    n = group.size
    nic = cluster.scaleout_bandwidth_per_gpu or 0.0
    least = (n - 1) / n * size / (cluster.scaleup_bandwidth + nic)
    for operation in ("all_gather", "reduce_scatter", "all_to_all", "all_reduce"):
        assert price(operation, size, cluster, group).time_s >= least


@given(placement=placements())
@settings(max_examples=200, deadline=None)
def test_bytes_are_conserved(placement: tuple[Cluster, Group]) -> None:
    """Sent bytes reach the bound of each operation exactly where an algorithm is bandwidth optimal, and never less."""
    cluster, group = placement
    view = fabric(cluster, group)
    n, g = group.size, view.domain.most
    even = view.domain.most == view.domain.least
    for terms in choices("all_gather", view):
        sent = terms.scaleup_bytes + terms.scaleout_bytes
        if terms.algorithm == "ring":
            assert sent == pytest.approx((n - 1) / n)
        elif even:
            assert sent >= (g - 1) / g + (view.domain.blocks - 1) / n - 1e-12
    for terms in choices("all_reduce", view):
        sent = terms.scaleup_bytes + terms.scaleout_bytes
        if terms.algorithm in ("ring", "tree") and even:
            assert sent == pytest.approx(2 * (n - 1) / n)
        if terms.algorithm == "nvls":
            assert sent == pytest.approx((n + 1) / n)
    for operation in ("all_to_all", "send_recv", "broadcast"):
        for terms in choices(operation, view):
            if terms.algorithm in ("pairwise", "p2p") or (terms.algorithm == "ring" and operation == "broadcast"):
                expected = 1.0 if operation == "send_recv" else (n - 1) / n
                assert terms.scaleup_bytes + terms.scaleout_bytes == pytest.approx(expected)


@given(placement=placements(), operation=operations)
@settings(max_examples=60, deadline=None)
def test_many_sizes_cost_what_each_costs(placement: tuple[Cluster, Group], operation: str) -> None:
    cluster, group = placement
    sizes = np.logspace(0, 11, 23)
    each = [cost.time_s for cost in sweep(operation, sizes, cluster, group)]
    np.testing.assert_allclose(price_array(operation, sizes, cluster, group), each, rtol=1e-12)


@given(placement=placements(), operation=operations, size=sizes)
@settings(max_examples=100, deadline=None)
def test_parts_add_up(placement: tuple[Cluster, Group], operation: str, size: float) -> None:
    cost = price(operation, size, *placement)
    assert cost.latency_s + cost.bandwidth_s == pytest.approx(cost.time_s)
    assert cost.latency_s > 0
    assert cost.algbw == pytest.approx(size / cost.time_s)
    assert cost.busbw == pytest.approx(cost.algbw * bus_factor(operation, cost.group_size))


def test_bus_factors_are_those_of_nccl_tests() -> None:
    factors = {operation: bus_factor(operation, 16) for operation in OPERATIONS}
    assert factors == {
        "all_reduce": 1.875,
        "all_gather": 0.9375,
        "reduce_scatter": 0.9375,
        "all_to_all": 0.9375,
        "broadcast": 1,
        "send_recv": 1,
    }


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_group_of_one_does_nothing(operation: str) -> None:
    cost = price(operation, 1e9, CLUSTERS["dgx-h100"], Group(size=1))
    assert (cost.time_s, cost.algorithm, cost.bytes_scaleup, cost.bytes_scaleout) == (0, "none", 0, 0)
    assert price_array(operation, [1.0, 1e9], CLUSTERS["dgx-h100"], Group(size=1)).tolist() == [0, 0]


def test_sizes_of_an_array_are_checked() -> None:
    with pytest.raises(InputError, match="a size is not above zero"):
        price_array("all_reduce", [1e6, 0], CLUSTERS["dgx-h100"], Group(size=8))


def test_choice_follows_size_and_scale() -> None:
    h100 = CLUSTERS["dgx-h100"]
    small, large = (price("all_reduce", size, h100, Group(size=8)) for size in (1024, 2**30))
    assert (small.algorithm, small.protocol) == ("ring", "LL")
    assert (large.algorithm, large.protocol) == ("nvls", "Simple")
    # Across nodes of H100 trees only: NVLSTree for large messages, the plain tree for those in LL and LL128.
    for gpus in (16, 256):
        small, large = (price("all_reduce", size, h100, Group(size=gpus)) for size in (1024, 2**30))
        assert (small.algorithm, small.protocol) == ("tree", "LL")
        assert (large.algorithm, large.protocol) == ("nvls_tree", "Simple")
        for size in 2.0 ** np.arange(2, 35):
            cost = price("all_reduce", size, h100, Group(size=gpus))
            assert (cost.algorithm == "nvls_tree") == (cost.protocol == "Simple")
        # What the selection passes over can be asked for.
        ring = price("all_reduce", 2**30, h100, Group(size=gpus), "ring")
        assert (ring.algorithm, ring.protocol) == ("ring", "Simple")
    # The switch reduces from five GPUs on, and only in all-reduces; one GPU of each node has no switch to share.
    assert price("all_reduce", 2**30, h100, Group(size=4)).algorithm == "ring"
    assert price("all_gather", 2**30, h100, Group(size=8)).algorithm == "ring"
    assert price("all_gather", 2**30, h100, Group(size=256)).algorithm == "ring"
    assert price("all_reduce", 2**30, h100, Group(size=32, stride=8)).algorithm in ("ring", "tree")
    a100 = load_cluster("dgx-a100", 256)
    assert price("all_reduce", 1024, a100, Group(size=256)).algorithm == "tree"
    assert price("all_reduce", 2**30, a100, Group(size=8)).algorithm == "ring"
    assert price("all_reduce", 2**30, CLUSTERS["tpu-v5e-pod"], Group(size=512)).algorithm == "hierarchical"
