"""Collectives that share links: fluid max-min rates against shares worked out by hand."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError, UnsupportedError
from simllm.hardware.cluster import load_cluster
from simllm.network import Group, price
from simllm.network.contention import Call, concurrent_times, fair_rates, imbalance, overlap_slowdown

H100 = load_cluster("dgx-h100", 32)


def line(**bandwidths: float) -> nx.Graph[object]:
    graph: nx.Graph[object] = nx.Graph()
    for name, bandwidth in bandwidths.items():
        graph.add_edge(("a", name), ("b", name), bandwidth=bandwidth)
    return graph


def over(**shares: float) -> dict[object, float]:
    return {(("a", name), ("b", name)): share for name, share in shares.items()}


def test_max_min_fair_rates() -> None:
    # The textbook line: x over both links, y over the first, z over the second; 10 and 4: x = z = 2, y = 8.
    graph = line(first=10.0, second=4.0)
    rates = fair_rates([over(first=1, second=1), over(first=1), over(second=1)], graph)  # type: ignore[list-item]
    assert rates == pytest.approx([2, 8, 2])
    # A collective that sends two bytes a byte over a link takes twice the room.
    assert fair_rates([over(first=2), over(first=1)], graph) == pytest.approx([10 / 3, 10 / 3])  # type: ignore[list-item]


@given(shares=st.lists(st.lists(st.floats(0, 4), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_no_link_is_over_full_and_each_collective_has_a_full_one(shares: list[list[float]]) -> None:
    graph = line(x=1.0, y=2.0, z=5.0)
    demands = [over(x=a, y=b, z=c) for a, b, c in shares if max(a, b, c) > 1e-6]
    rates = fair_rates(demands, graph)  # type: ignore[arg-type]
    used = {
        link: sum(rate * demand[link] for rate, demand in zip(rates, demands, strict=True))
        for link in over(x=1, y=1, z=1)
    }
    for link, amount in used.items():
        assert amount <= graph.edges[link]["bandwidth"] * (1 + 1e-6)  # type: ignore[index]
    for demand in demands:
        assert any(
            demand[link] > 0 and used[link] >= graph.edges[link]["bandwidth"] * (1 - 1e-6)  # type: ignore[index]
            for link in demand
        )


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "all_to_all"])
def test_one_alone_costs_its_price(operation: str) -> None:
    (seconds,) = concurrent_times(H100, [Call(operation=operation, size_bytes=2**30, ranks=tuple(range(32)))])
    assert seconds == pytest.approx(price(operation, 2**30, H100, Group(size=32)).time_s)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_groups_over_the_same_nics_get_their_share(k: int) -> None:
    call = Call(operation="all_gather", size_bytes=2**32, ranks=tuple(range(0, 32, 8)))
    (alone,), shared = concurrent_times(H100, [call]), concurrent_times(H100, [call] * k)
    assert shared == pytest.approx([k * alone] * k, rel=0.01)  # but for the latency
    assert all(seconds < k * alone for seconds in shared)


def test_rails_share_nothing() -> None:
    calls = [Call(operation="all_gather", size_bytes=2**30, ranks=tuple(range(i, 32, 8))) for i in range(8)]
    assert concurrent_times(H100, calls) == pytest.approx([concurrent_times(H100, calls[:1])[0]] * 8)


def test_the_others_speed_up_when_one_is_done() -> None:
    small, large = (
        Call(operation="all_gather", size_bytes=size, ranks=tuple(range(0, 32, 8))) for size in (2**30, 3 * 2**30)
    )
    first, second = concurrent_times(H100, [small, large])
    # Both at half rate until the small one is done after 2 units; then 2 units of the large one are left.
    assert second / first == pytest.approx(2, rel=0.02)


def test_groups_inside_a_node_do_not_touch_the_nics() -> None:
    inside = Call(operation="all_gather", size_bytes=2**30, ranks=tuple(range(8)))
    across = Call(operation="all_gather", size_bytes=2**30, ranks=tuple(range(8, 32, 8)))
    assert concurrent_times(H100, [inside, across]) == pytest.approx(
        [concurrent_times(H100, [call])[0] for call in (inside, across)]
    )


def test_imbalance() -> None:
    assert imbalance([3, 3, 3]) == 1
    assert imbalance([4, 0, 0, 0]) == 4
    for wrong in ([], [0.0], [-1.0, 2.0]):
        with pytest.raises(InputError, match="received_bytes"):
            imbalance(wrong)


def test_bad_calls() -> None:
    with pytest.raises(InputError, match="rank 1 is listed twice"):
        Call(operation="all_reduce", size_bytes=1.0, ranks=(0, 1, 1))
    with pytest.raises(InputError, match="size=0 bytes"):
        Call(operation="all_reduce", size_bytes=0, ranks=(0, 1))
    with pytest.raises(InputError, match="rank 32 is beyond the 32 GPUs"):
        concurrent_times(H100, [Call(operation="all_reduce", size_bytes=1.0, ranks=(0, 32))])
    with pytest.raises(UnsupportedError, match="send_recv beside other"):
        concurrent_times(H100, [Call(operation="send_recv", size_bytes=1.0, ranks=(0, 1))])
    with pytest.raises(UnsupportedError, match="share a torus"):
        concurrent_times(load_cluster("tpu-v5e-pod", 16), [])
    with pytest.raises(UnsupportedError, match="nobody measured kernels beside collectives over ici"):
        overlap_slowdown(load_cluster("tpu-v5e-pod", 16))


# -- groups of a plan --------------------------------------------------------------------------------------------------


def test_a_price_takes_the_sister_groups_of_a_plan_into_account() -> None:
    """Eight strided groups of nodes with four NICs: the closed form and the fluid on the graph share them alike."""
    cluster = load_cluster("abci-a", 32)
    assert cluster.nics_per_node == 4
    calls = [Call(operation="all_gather", size_bytes=2.0**32, ranks=tuple(range(i, 32, 8))) for i in range(8)]
    together = concurrent_times(cluster, calls)
    alone = concurrent_times(cluster, calls[:1])[0]
    default = price("all_gather", 2.0**32, cluster, Group(size=4, stride=8))
    assert together == pytest.approx([default.time_s] * 8, rel=0.02)
    assert price("all_gather", 2.0**32, cluster, Group(size=4, stride=8, concurrent=8)) == default
    single = price("all_gather", 2.0**32, cluster, Group(size=4, stride=8, concurrent=1))
    # Alone a GPU has the whole NIC that it otherwise shares with a neighbour.
    assert single.bottleneck_bandwidth == 2 * default.bottleneck_bandwidth
    assert alone == pytest.approx(single.time_s, rel=0.02)


def test_more_groups_at_once_are_never_faster() -> None:
    cluster = load_cluster("abci-a", 32)
    times = [price("all_reduce", 1e8, cluster, Group(size=4, stride=8, concurrent=k)).time_s for k in range(1, 9)]
    assert times == sorted(times)
    assert times[-1] > 1.5 * times[0]


def test_more_concurrent_groups_than_gpus_are_refused() -> None:
    with pytest.raises(InputError, match="9 concurrent groups with 1 members in each domain need 9 GPUs"):
        price("all_reduce", 1e8, load_cluster("abci-a", 32), Group(size=4, stride=8, concurrent=9))
    with pytest.raises(InputError, match="concurrent=0 must be a whole number"):
        Group(size=4, concurrent=0)
