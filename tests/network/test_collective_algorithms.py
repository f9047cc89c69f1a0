"""Each algorithm against times worked out by hand on links with round figures."""

from __future__ import annotations

from dataclasses import replace
from math import hypot, sqrt
from pathlib import Path

import msgspec
import numpy as np
import pytest

from simllm.errors import InputError, UnsupportedError
from simllm.hardware.cluster import load_cluster
from simllm.hardware.figures import Bytes, BytesPerSecond, Count
from simllm.hardware.links import Curve, Link, Multiple, Part, Posting, Protocol, Seconds, SlotParts, SwitchCurve
from simllm.hardware.profiles import check_profile, load_profile_file, profiles_dir
from simllm.network import Group, price
from simllm.network.alltoall import all_to_all
from simllm.network.collnet import collnet
from simllm.network.fabric import Cut, Fabric, fabric
from simllm.network.group import Spread, spread
from simllm.network.hierarchical import hierarchical, hierarchical_broadcast
from simllm.network.nvls import nvls, nvls_tree
from simllm.network.p2p import send_recv
from simllm.network.pat import pat
from simllm.network.posting import posting_s
from simllm.network.pxn import pxn
from simllm.network.ring import broadcast, ring
from simllm.network.terms import Terms
from simllm.network.torus import grid, torus
from simllm.network.tree import busiest_domain_bytes, tree


def _us(value: float) -> Seconds:
    return Seconds(value=value, unit="us", source="test", basis="assumed")


def _part(value: float) -> Part:
    return Part(value=value, unit="fraction", source="test", basis="assumed")


def _rate(value: float) -> BytesPerSecond:
    return BytesPerSecond(value=value, unit="GB/s", source="test", basis="assumed")


def _curve(efficiency: float, launch: float, step: float, copy: float = 0.0, ramp: float = 0.0) -> Curve:
    slots = SlotParts(value=copy, unit="fraction", source="test", basis="assumed")
    return Curve(efficiency=_part(efficiency), launch=_us(launch), step=_us(step), ramp=_us(ramp), copy=slots)


UP = Link(
    kind="link",
    name="inside",
    scope="scale-up",
    description="round figures",
    algorithms=("ring", "tree", "nvls", "nvls_tree"),
    ring=_curve(0.5, 10, 1),
    switch=SwitchCurve(
        efficiency=_part(0.5),
        launch=_us(30),
        ramp=_us(0),
        minimum_group=Count(value=4, unit="count", source="test", basis="assumed"),
    ),
    all_to_all=_curve(0.5, 10, 1),
    p2p=_curve(0.5, 10, 1),
)
OUT = Link(
    kind="link",
    name="across",
    scope="scale-out",
    description="round figures",
    ring=_curve(1, 5, 10),
    tree=_curve(1, 5, 10),
    all_to_all=_curve(1, 5, 10),
    p2p=_curve(1, 5, 10),
)


def view(size: int, domains: int, *, up: float = 100e9, nic: float = 10e9, rails: int = 8) -> Fabric:
    """``size`` ranks spread evenly over ``domains`` domains, ``up`` bytes/s inside, ``nic`` bytes/s a GPU outside."""
    members = size // domains
    cut = Cut(name="across", blocks=domains, least=members, members=min(members, rails), bandwidth=nic)
    return Fabric(
        size=size,
        domain=Spread(blocks=domains, most=members, least=members),
        up=UP,
        out=OUT if domains > 1 else None,
        up_bandwidth=up,
        shuffle_bandwidth=up,
        pair_bandwidth=up,
        cuts=(cut,) if domains > 1 else (),
        grid=None,
    )


def simple(terms: tuple[Terms, ...]) -> Terms:
    return terms[-1]


def test_ring_inside_a_domain() -> None:
    # 4 ranks: 2 * 3 steps of 1 us after 10 us; 1.5 bytes a byte over 50 GB/s.
    terms = simple(ring(view(4, 1), 2))
    assert terms.latency_s == pytest.approx(16e-6)
    # 150 MB take 4.5 ms, and 200 bytes 6 ns; where bytes and steps take 6 us each, one hides two fifths of the other.
    assert terms.time_s(150e6) == pytest.approx(10e-6 + 4.5e-3, rel=1e-5)
    assert terms.time_s(200) == pytest.approx(16e-6, rel=1e-5)
    assert terms.time_s(2e5) == pytest.approx(10e-6 + sqrt(2) * 6e-6)
    assert terms.times_s(np.array([2e5]), np.array([2e5**0.5])) == pytest.approx(10e-6 + sqrt(2) * 6e-6)
    assert terms.scaleup_bytes == 1.5
    assert terms.scaleout_bytes == 0
    gather = simple(ring(view(4, 1), 1))
    assert gather.time_s(4e5 / 3) == pytest.approx(10e-6 + hypot(3e-6, 2e-6))


def test_ring_copies_slots() -> None:
    # One more slot of S/4 for each GPU: 1.75 bytes a byte.
    link = msgspec.structs.replace(UP, ring=_curve(0.5, 10, 1, copy=1.0))
    terms = simple(ring(replace(view(4, 1), up=link), 2))
    assert terms.s_per_byte == pytest.approx(1.75 / 50e9)
    assert terms.scaleup_bytes == 1.5


def test_ring_across_domains_uses_all_nics() -> None:
    # 16 ranks in 2 domains of 8: 30 steps, 2 of them across; 15/8 bytes over 8 NICs of 10 GB/s.
    terms = simple(ring(view(16, 2, up=400e9), 2))
    assert terms.latency_s == pytest.approx((10 + 5 + 28 * 1 + 2 * 10) * 1e-6)
    assert terms.s_per_byte == pytest.approx(15 / 8 / 80e9)
    assert (terms.bottleneck, terms.bottleneck_bandwidth) == ("across", 80e9)
    assert terms.scaleout_bytes == pytest.approx(15 / 8 / 8)
    # One member in each of 4 domains: every step crosses, one NIC each.
    terms = simple(ring(view(4, 4), 1))
    assert terms.latency_s == pytest.approx((10 + 5 + 3 * 10) * 1e-6)
    assert terms.s_per_byte == pytest.approx(0.75 / 10e9)
    assert terms.scaleup_bytes == 0


def test_rails_limit_large_domains() -> None:
    # 32 GPUs a domain, but 8 rails: 80 GB/s, not 320.
    terms = simple(ring(view(64, 2, up=400e9), 2))
    assert terms.s_per_byte == pytest.approx(2 * 63 / 64 / 80e9)


def test_broadcast_sends_all_bytes_over_every_edge() -> None:
    terms = simple(broadcast(view(8, 1)))
    # The hops inside a domain overlap: 1 us for all of them after 10 us of launch.
    assert terms.latency_s == pytest.approx(11e-6)
    assert terms.s_per_byte == pytest.approx(1 / 50e9)
    # 7 edges share among 8 GPUs.
    assert terms.scaleup_bytes == 7 / 8


def test_few_threads_hand_on_short_broadcasts() -> None:
    # Among 8 ranks one thread for 64 bytes, at least 64 of them: 1 GB/s up to 4 KiB, and no longer than that beyond.
    short = Protocol(launch=_us(8), rate=_rate(4))
    curve = msgspec.structs.replace(_curve(0.5, 10, 1), injection=_rate(1), ll=short)
    found = broadcast(replace(view(8, 1), up=msgspec.structs.replace(UP, broadcast=curve)))
    assert {terms.protocol for terms in found} == {"LL", "Simple"}
    low = [terms for terms in found if terms.protocol == "LL"]
    for size, handed_on in ((512, 512), (4096, 4096), (16384, 4096)):
        assert min(terms.time_s(size) for terms in low) == pytest.approx(8e-6 + handed_on / 1e9 + size / 4e9)
    assert simple(found).time_s(1e6) == pytest.approx(11e-6 + 1e6 / 50e9)


def test_networks_hand_on_short_broadcasts_at_their_own_rate() -> None:
    short = Protocol(rate=_rate(4))
    slow, fast = (msgspec.structs.replace(_curve(1, 5, 10), injection=_rate(rate), ll=short) for rate in (0.5, 2))
    up = msgspec.structs.replace(UP, broadcast=fast)
    out = msgspec.structs.replace(OUT, broadcast=slow)
    inside = min(t.time_s(1000) for t in broadcast(replace(view(8, 1), up=up)))
    across = min(t.time_s(1000) for t in broadcast(replace(view(16, 2), up=up, out=out)))
    assert inside == pytest.approx(5e-6 + 1000 / 2e9 + 1000 / 4e9)
    assert across == pytest.approx(2 * 5e-6 + 1000 / 0.5e9 + 1000 / 4e9)


def test_old_libraries_start_few_threads_in_rings_too() -> None:
    curve = msgspec.structs.replace(_curve(0.5, 10, 1), injection=_rate(1), ll=Protocol(step=_us(0.1), rate=_rate(4)))
    found = ring(replace(view(8, 1), up=msgspec.structs.replace(UP, ring=curve)), 2)
    for size, handed_on in ((512, 512), (65536, 4096)):
        time_s = min(terms.time_s(size) for terms in found if terms.protocol == "LL")
        assert time_s == pytest.approx(10e-6 + 1.75 * handed_on / 1e9 + hypot(1.4e-6, 1.75 * size / 4e9))


def test_threads_limit_short_protocols_over_any_wire() -> None:
    # 7 messages of S/8 at once, each at 2 GB/s by its own threads: 14 GB/s of the 50 that large messages reach.
    curve = msgspec.structs.replace(_curve(0.5, 10, 0), ll=Protocol(rate=_rate(2)))
    low = next(t for t in all_to_all(replace(view(8, 1), up=msgspec.structs.replace(UP, all_to_all=curve))))
    assert (low.protocol, low.time_s(8e4)) == ("LL", pytest.approx(10e-6 + 1e4 / 2e9))
    # Where the wire is slower, the flags take half of it in LL and a twelfth in LL128.
    curve = msgspec.structs.replace(_curve(0.5, 10, 0), ll=Protocol(rate=_rate(200)), ll128=Protocol())
    found = all_to_all(replace(view(8, 1), up=msgspec.structs.replace(UP, all_to_all=curve)))
    rates = [7 / 8 / terms.s_per_byte / 1e9 for terms in found]
    assert rates == pytest.approx([25, 46, 50])


def test_protocols_end_at_their_largest_slot() -> None:
    # LL: steps of 0.1 us at a tenth of the wire, in slots of up to 4 KiB, so for up to 32 KiB among 8 ranks.
    short = Protocol(
        step=_us(0.1), efficiency=_part(0.1), slot=Bytes(value=4, unit="KiB", source="test", basis="assumed")
    )
    curve = msgspec.structs.replace(_curve(0.5, 10, 1), ll=short)
    low, high = ring(replace(view(8, 1), up=msgspec.structs.replace(UP, ring=curve)), 2)
    assert (low.protocol, high.protocol, low.most_bytes) == ("LL", "Simple", 8 * 4096)
    assert low.time_s(32768) == pytest.approx(10e-6 + hypot(1.4e-6, 1.75 * 32768 / 10e9))
    assert low.time_s(32769) == float("inf")
    assert high.time_s(32769) == pytest.approx(10e-6 + hypot(14e-6, 1.75 * 32769 / 50e9))


def test_one_process_posts_for_all_its_gpus() -> None:
    # 8 launches of 3 us; an all-to-all also posts 2 * 7 messages of 0.5 us for each GPU.
    up = msgspec.structs.replace(UP, posting=Posting(launch=_us(3), message=_us(0.5)))
    one = replace(view(8, 1), up=up, ranks_per_process=8)
    assert posting_s("all_reduce", one) == pytest.approx(24e-6)
    assert posting_s("all_to_all", one) == pytest.approx(8 * (3 + 14 * 0.5) * 1e-6)
    assert posting_s("all_to_all", view(8, 1)) == 0
    with pytest.raises(UnsupportedError, match="nobody measured one process"):
        posting_s("all_reduce", replace(view(8, 1), ranks_per_process=8))
    cluster = load_cluster("dgx-a100", 8)
    many, single = (price("all_to_all", 1024, cluster, Group(size=8, ranks_per_process=n)) for n in (1, 8))
    assert single.time_s > 4 * many.time_s
    assert single.latency_s + single.bandwidth_s == pytest.approx(single.time_s)


def test_staged_transfers_share_one_link() -> None:
    boxes = {n: replace(load_cluster("tinybox-green", 6), scaleup_link="host-staged") for n in (2, 6)}
    wire = boxes[6].scaleup_bandwidth
    assert [fabric(boxes[n], Group(size=n)).up_bandwidth for n in (2, 6)] == pytest.approx([wire / 2, wire / 6])


def test_tree() -> None:
    assert [busiest_domain_bytes(n) for n in (1, 2, 3, 4, 5)] == [0, 1, 1.5, 2, 2]
    # 4 domains of 8: 14 steps inside, 2 log2 4 = 4 levels across; 2 S out of the busiest domain over 80 GB/s.
    terms = simple(tree(view(32, 4)))
    assert terms.latency_s == pytest.approx((10 + 5 + 14 + 4 * 10) * 1e-6)
    assert terms.s_per_byte == pytest.approx(max(2 / 80e9, 1.75 / 50e9))
    assert terms.scaleup_bytes + terms.scaleout_bytes == pytest.approx(2 * 31 / 32)
    assert tree(view(8, 1)) == ()

    # Its short protocols end where its own slots do, the whole buffer; those of the rings inside are parts of it.
    inner, outer = (
        Protocol(
            step=_us(0.1), efficiency=_part(0.1), slot=Bytes(value=kib, unit="KiB", source="test", basis="assumed")
        )
        for kib in (4, 64)
    )
    up = msgspec.structs.replace(UP, ring=msgspec.structs.replace(UP.ring, ll=inner))
    assert OUT.tree is not None
    out = msgspec.structs.replace(OUT, tree=msgspec.structs.replace(OUT.tree, ll=outer))
    short = tree(replace(view(32, 4), up=up, out=out))[0]
    assert (short.protocol, short.most_bytes) == ("LL", 65536)


def test_nvls() -> None:
    # 8 GPUs send S + S/8 at 50 GB/s, whatever their number the latency is 30 us.
    terms = simple(nvls(view(8, 1)))
    assert terms.time_s(1e9) == pytest.approx(30e-6 + 1.125 / 50)
    assert nvls(view(2, 1)) == ()
    tree_terms = simple(nvls_tree(view(32, 4)))
    assert tree_terms.latency_s == pytest.approx((30 + 5 + 4 * 10) * 1e-6)
    assert tree_terms.s_per_byte == pytest.approx(2 / 80e9)
    assert nvls_tree(view(8, 4)) == ()
    # Half of the wire where the sums go on to other domains: 1.125 bytes over 25 GB/s, slower than the NICs.
    assert UP.switch is not None
    onward = msgspec.structs.replace(UP, switch=msgspec.structs.replace(UP.switch, onward_efficiency=_part(0.25)))
    assert simple(nvls_tree(replace(view(32, 4), up=onward))).s_per_byte == pytest.approx(1.125 / 25e9)
    assert simple(nvls(replace(view(8, 1), up=onward))).s_per_byte == pytest.approx(1.125 / 50e9)


def test_all_to_all() -> None:
    terms = simple(all_to_all(view(8, 1)))
    # 7 messages to post hide behind bytes that take as long.
    assert terms.time_s(4e5) == pytest.approx(10e-6 + sqrt(2) * 7e-6)
    # 2 domains of 8: half of the buffer leaves through one NIC of 10 GB/s; 7 messages inside, 8 across.
    terms = simple(all_to_all(view(16, 2)))
    assert terms.latency_s == pytest.approx((10 + 5 + 7 + 80) * 1e-6)
    assert terms.s_per_byte == pytest.approx(0.5 / 10e9)
    assert (terms.scaleup_bytes, terms.scaleout_bytes) == (7 / 16, 8 / 16)


def test_channels_move_what_stays_too() -> None:
    # 3 channels of 10 GB/s for all of S: slower than half of S over 50 GB/s, faster than it between domains.
    three = Multiple(value=3, unit="count", source="test", basis="assumed")
    curve = msgspec.structs.replace(_curve(0.5, 10, 1), channels=three, channel=_rate(10))
    up = msgspec.structs.replace(UP, all_to_all=curve)
    assert simple(all_to_all(replace(view(2, 1), up=up))).s_per_byte == pytest.approx(1 / 30e9)
    assert simple(all_to_all(replace(view(16, 2), up=up))).s_per_byte == pytest.approx(0.5 / 10e9)
    many = msgspec.structs.replace(curve, channel=_rate(100))
    wide = msgspec.structs.replace(UP, all_to_all=many)
    assert simple(all_to_all(replace(view(2, 1), up=wide))).s_per_byte == pytest.approx(0.5 / 50e9)


def test_send_recv() -> None:
    # What a call costs hides behind the bytes of the one before it: 11 us, and 20 us of bytes.
    assert simple(send_recv(view(2, 1))).time_s(1e6) == pytest.approx(hypot(11e-6, 20e-6))
    terms = simple(send_recv(view(2, 2)))
    assert terms.time_s(1e6) == pytest.approx(hypot(25e-6, 100e-6))
    assert (terms.scaleup_bytes, terms.scaleout_bytes) == (0, 1)


def test_hierarchical_adds_its_levels() -> None:
    # Inside 2 * 7/8 over 50 GB/s, across 2 * 3/4 over 8 NICs, one after the other.
    terms = simple(hierarchical(view(32, 4), 2))
    assert terms.s_per_byte == pytest.approx(1.75 / 50e9 + 1.5 / 80e9)
    assert terms.latency_s == pytest.approx((10 + 14 + 5 + 6 * 10) * 1e-6)
    assert terms.scaleout_bytes == pytest.approx(1.5 / 8)
    assert hierarchical(view(8, 1), 2) == ()
    assert simple(hierarchical_broadcast(view(32, 4))).s_per_byte == pytest.approx(1 / 50e9 + 1 / 80e9)
    # Few threads hand short messages on inside, at 1 GB/s, and then everything crosses.
    curve = msgspec.structs.replace(_curve(0.5, 10, 0), injection=_rate(1), ll=Protocol(rate=_rate(50)))
    found = hierarchical(replace(view(32, 4), up=msgspec.structs.replace(UP, ring=curve)), 2)
    short = next(terms for terms in found if terms.threads_s_per_byte)
    assert short.time_s(512) == pytest.approx(75e-6 + (1.75 / 1e9 + 1.75 / 25e9 + 1.5 / 80e9) * 512)


def test_torus_is_the_vendors_all_reduce_bandwidth() -> None:
    # Google: a v5e pod of 256 chips all-reduces at 51.2 TB/s, 200 GB/s a chip, and has 1.6 TB/s of bisection.
    pod = fabric(load_cluster("tpu-v5e-pod", 256), Group(size=256))
    assert pod.up_bandwidth * 256 == pytest.approx(51.2e12)
    assert pod.shuffle_bandwidth == pytest.approx(25e9)
    terms = simple(torus(pod, 2))
    assert terms.s_per_byte == pytest.approx(2 * 255 / 256 / (200e9 * pod.up.ring.efficiency.si))


def test_torus_axes() -> None:
    wiring = load_cluster("tpu-v5p-pod", 64).scaleup_fabric
    whole = grid(wiring, (4, 4, 4), 64, 1, 600e9)  # type: ignore[arg-type]
    assert (whole.ring_bandwidth, whole.hops) == (600e9, 6)
    # A row of 4 chips is a closed ring of 100 GB/s each way; a column of 4, 16 chips apart, as well.
    assert grid(wiring, (4, 4, 4), 4, 1, 600e9).ring_bandwidth == 200e9  # type: ignore[arg-type]
    assert grid(wiring, (4, 4, 4), 4, 16, 600e9).ring_bandwidth == 200e9  # type: ignore[arg-type]
    # Two neighbours have one link; every other chip of a ring shares the links with one sister group.
    assert grid(wiring, (4, 4, 4), 2, 1, 600e9).ring_bandwidth == 100e9  # type: ignore[arg-type]
    assert grid(wiring, (4, 4, 4), 2, 2, 600e9).ring_bandwidth == 100e9  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "stride", "block", "expected"),
    [
        (8, 1, 8, (1, 8, 8)),
        (16, 8, 8, (16, 1, 1)),
        (8, 2, 8, (2, 4, 4)),
        (9, 1, 8, (2, 8, 1)),
        (4, 6, 8, (3, 2, 1)),
        (144, 1, 72, (2, 72, 72)),
        (3, 100, 72, (3, 1, 1)),
    ],
)
def test_spread(size: int, stride: int, block: int, expected: tuple[int, int, int]) -> None:
    assert spread(size, stride, block) == Spread(blocks=expected[0], most=expected[1], least=expected[2])


def test_members_share_the_nics_of_their_node() -> None:
    cluster = load_cluster("dgx-h100", 64)
    rail = fabric(cluster, Group(size=8, stride=8)).cuts[0]
    assert (rail.blocks, rail.members, rail.bandwidth) == (8, 1, 50e9)
    pair = fabric(cluster, Group(size=16, stride=4)).cuts[0]
    assert pair.members * pair.bandwidth == 100e9


def test_nvl72_is_one_domain_over_many_nodes() -> None:
    cluster = load_cluster("gb200-nvl72", 144)
    assert fabric(cluster, Group(size=72)).out is None
    two = fabric(cluster, Group(size=144))
    assert (two.domain.blocks, two.domain.most, two.cuts[0].members) == (2, 72, 8)


def test_tapered_tier_is_a_cut() -> None:
    cluster = load_cluster("meta-grand-teton", 6144)
    pods, ratio = cluster.taper[-1]
    assert pods < 6144
    shuffle = price("all_to_all", 2**30, cluster, Group(size=6144))
    assert shuffle.bottleneck == f"roce uplinks of {pods} GPUs"
    assert shuffle.bottleneck_bandwidth == pytest.approx(50e9 / ratio)
    # A ring crosses the tier once for each pod, so 3072 members have room for it.
    assert price("all_reduce", 2**30, cluster, Group(size=6144)).bottleneck == "roce"


def test_mesh_gives_a_pair_one_of_its_links() -> None:
    cluster = load_cluster("mi300x-platform", 8)
    assert fabric(cluster, Group(size=8)).up_bandwidth == 448e9
    assert fabric(cluster, Group(size=2)).up_bandwidth == pytest.approx(64e9)
    assert fabric(cluster, Group(size=8)).pair_bandwidth == pytest.approx(64e9)


def test_cube_mesh_follows_its_wires() -> None:
    cluster = load_cluster("dgx-1v", 8)
    links = [fabric(cluster, Group(size=n)).up_bandwidth / 25e9 for n in (2, 4, 8)]
    assert links == pytest.approx([1, 4, 6])


def test_bad_input() -> None:
    cluster = load_cluster("dgx-h100", 16)
    with pytest.raises(InputError, match="reaches rank 23, but cluster dgx-h100 has 16 GPUs"):
        price("all_reduce", 1e6, cluster, Group(size=24))
    with pytest.raises(InputError, match="size=0 bytes"):
        price("all_reduce", 0, cluster, Group(size=8))
    with pytest.raises(InputError, match="size=-5 bytes"):
        price("all_reduce", -5, cluster, Group(size=8))
    with pytest.raises(InputError, match="unknown collective 'allreduce'; did you mean all_reduce"):
        price("allreduce", 1e6, cluster, Group(size=8))
    with pytest.raises(InputError, match="unknown algorithm for all_gather 'nvls'"):
        price("all_gather", 1e6, cluster, Group(size=8), "nvls")
    with pytest.raises(UnsupportedError, match="nvls cannot run all_reduce on 2 ranks"):
        price("all_reduce", 1e6, cluster, Group(size=2), "nvls")
    with pytest.raises(InputError, match="group size=0 must be"):
        Group(size=0)
    with pytest.raises(InputError, match="which has no scale-out network"):
        price("all_reduce", 1e6, replace(cluster, scaleout_link=None), Group(size=16))


def test_forced_algorithm_is_used() -> None:
    cluster = load_cluster("dgx-h100", 16)
    assert price("all_reduce", 2**33, cluster, Group(size=8)).algorithm == "nvls"
    assert price("all_reduce", 2**33, cluster, Group(size=8), "ring").algorithm == "ring"
    assert price("all_reduce", 2**33, cluster, Group(size=16), "hierarchical").algorithm == "hierarchical"


def test_groups_of_listed_ranks() -> None:
    assert Group.of([24, 8, 0, 16]) == Group(size=4, stride=8)
    assert Group.of([5]) == Group(size=1)
    assert Group.of(range(8)) == Group(size=8)
    for ranks, said in (
        ([0, 1, 1], "rank 1 is listed twice in the group"),
        ([], "a group of no ranks"),
        ([0, 1, 4], r"not at equal distances \(1, 3\)"),
        ([-1, 0], "rank -1 is not a whole number"),
        ([0.5, 1.5], "rank 0.5 is not a whole number"),
        ([True, 2], "rank True is not a whole number"),
    ):
        with pytest.raises(InputError, match=said):
            Group.of(ranks)  # type: ignore[arg-type]


def test_collnet() -> None:
    # 4 domains of 8, SHARP on a wire without loss: S over 8 NICs of 10 GB/s, however many domains there are.
    out = msgspec.structs.replace(
        OUT,
        switch=SwitchCurve(
            efficiency=_part(1),
            launch=_us(20),
            ramp=_us(0),
            minimum_group=Count(value=2, unit="count", source="test", basis="assumed"),
        ),
    )
    for domains in (2, 4, 16):
        (terms,) = collnet(replace(view(8 * domains, domains), out=out))
        assert terms.s_per_byte == pytest.approx(max(1 / 80e9, 1.125 / 50e9))
        assert terms.latency_s == pytest.approx(50e-6)
        assert terms.scaleout_bytes == 1 / 8
    plain = msgspec.structs.replace(UP, switch=None, algorithms=("ring",))
    # Without a switch inside: scatter and gather over the links, 14 steps.
    (terms,) = collnet(replace(view(32, 4), out=out, up=plain))
    assert terms.latency_s == pytest.approx((10 + 20 + 14) * 1e-6)
    assert terms.s_per_byte == pytest.approx(1.75 / 50e9)
    assert collnet(view(32, 4)) == ()
    cluster = load_cluster("dgx-h100", 256)
    forced = price("all_reduce", 2**33, cluster, Group(size=256), "collnet")
    # Published with SHARP: 450 to 480 GB/s of bus bandwidth (Azure, NVIDIA), where rings and trees reach 380.
    assert 450e9 < forced.busbw < 510e9
    assert price("all_reduce", 2**33, cluster, Group(size=256)).algorithm == "nvls_tree"
    # HDR: Jeaugey expects 220 GB/s of DGX A100 nodes, where NVLink is the limit. Their class has no such switch inside.
    ampere = price("all_reduce", 2**33, load_cluster("dgx-a100", 256), Group(size=256), "collnet")
    assert ampere.bottleneck == "nvlink3"
    assert ampere.busbw == pytest.approx(220e9, rel=0.3)


def test_pat() -> None:
    out = msgspec.structs.replace(OUT, pat=msgspec.structs.replace(_curve(0.5, 8, 4), inner_step=_us(3)))
    # 8 ranks, one a domain: 3 rounds of 4 us and 8 parts of 3 us; 7/8 over 5 GB/s.
    (terms,) = pat(replace(view(8, 8), out=out))
    assert terms.latency_s == pytest.approx((8 + 12 + 24) * 1e-6)
    assert terms.s_per_byte == pytest.approx(0.875 / 5e9)
    assert pat(replace(view(16, 2), out=out)) == ()
    assert pat(view(8, 8)) == ()


def test_pxn() -> None:
    # 2 domains of 8: half leaves, 7/16 stays, 7/8 of what leaves changes rails first; 2 * 7 and 1 messages.
    terms = simple(pxn(view(16, 2)))
    assert terms.scaleup_bytes == pytest.approx(7 / 16 + 0.5 * 7 / 8)
    assert terms.scaleout_bytes == 0.5
    assert terms.latency_s == pytest.approx((10 + 5 + 14 + 10) * 1e-6)
    assert terms.s_per_byte == pytest.approx(0.5 / 10e9)
    assert pxn(view(8, 1)) == ()
    assert pxn(view(8, 8)) == ()
    many = price("all_to_all", 2**20, load_cluster("dgx-h100", 256), Group(size=256))
    assert many.algorithm == "pxn"


def test_link_profiles_that_cannot_be(tmp_path: Path) -> None:
    good = (profiles_dir() / "links" / "dcn.yaml").read_text(encoding="utf-8")
    for old, new, said in (
        ("value: 10, unit: us,", "value: 10,", "the key `unit` is missing"),
        ("unit: us", "unit: GB/s", "measures bytes/s, but time is wanted"),
        ("unit: us", "unit: parsec", "unknown unit 'parsec'"),
        ("value: 0.8", "value: 1.2", "no message is faster than the wire"),
        ("value: 0.8", "value: 0", "value 0 must be above zero"),
        ("scope: scale-out", "scope: scale-up", "a scale-up link names the algorithms"),
        ("scope: scale-out", "scope: scale-out\nshared: true", "belong to the scale-up link"),
    ):
        path = tmp_path / "link.yaml"
        assert old in good
        path.write_text(good.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(InputError, match=said):
            load_profile_file(path, Link)


def test_a_class_like_no_other(tmp_path: Path) -> None:
    good = (profiles_dir() / "links" / "efa.yaml").read_text(encoding="utf-8")
    path = tmp_path / "efa.yaml"
    path.write_text(good.replace("like: provider-network", "like: carrier-pigeon"), encoding="utf-8")
    assert "no link class 'carrier-pigeon'" in check_profile(path)[0]


def test_wires_without_bandwidth() -> None:
    cluster = load_cluster("dgx-h100", 16)
    for change in ({"scaleup_bandwidth": 0.0}, {"scaleout_bandwidth_per_node": 0.0}):
        with pytest.raises(InputError, match="has no bandwidth"):
            price("all_reduce", 1e6, replace(cluster, **change), Group(size=16))
