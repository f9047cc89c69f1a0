"""Clusters: sizes that exist, sizes that are refused, and clusters described only by their devices."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import check_profile, list_profiles, load_accelerator, load_cluster, make_cluster
from simllm.hardware.fabric import load_fabric
from simllm.hardware.links import load_link
from simllm.hardware.profiles import profiles_dir


def test_a_cluster_of_ones_own(lab: Path) -> None:
    cluster = load_cluster(lab, 16)
    assert (cluster.name, cluster.accelerator.name, cluster.num_nodes) == ("lab", "card", 8)
    assert (cluster.scaleup_topology, cluster.scaleup_link, cluster.scaleup_bandwidth) == ("pcie", "pcie4", 31.5e9)
    assert (cluster.scaleout_link, cluster.scaleout_bandwidth_per_node) == ("ethernet", 12.5e9)
    assert cluster.scaleout_bandwidth_per_gpu == 6.25e9
    # 4 nodes of 2 below a leaf at 2:1, 8 nodes of 2 below a pod at 4:1
    assert cluster.taper == ((8, 2.0), (16, 4.0))
    assert cluster.max_gpus == 32
    assert check_profile(lab) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("accelerator: card.yaml", "accelerator: none.yaml", "none.yaml does not exist"),
        ("accelerator: card.yaml", "accelerator: h100-sxn", "unknown accelerator 'h100-sxn'; did you mean h100-sxm"),
        ("fabric: pcie-box", "fabric: fat-tree", "fabric fat-tree joins nodes"),
        ("fabric: tree.yaml", "fabric: pcie-box", "fabric pcie-box joins the devices of a domain"),
        ("fabric: tree.yaml", "fabric: fat-tre", "unknown fabric 'fat-tre'; did you mean fat-tree"),
        ("domain_gpus: {value: 2", "domain_gpus: {value: 3", "scaleup.domain_gpus=3 is not a multiple of node.gpus=2"),
        ("unit: Gbps", "unit: GB", "node.nic_bandwidth: unit 'GB' measures bytes"),
        ("link: pcie4\n", "link: pcie4\n  speed: 3\n", "scaleup: unknown key `speed`"),
        ("accelerator: card.yaml\n", "", "the key `accelerator` is missing"),
    ],
)
def test_bad_systems_are_refused(lab: Path, old: str, new: str, said: str) -> None:
    assert old in lab.read_text()
    lab.write_text(lab.read_text().replace(old, new))
    with pytest.raises(InputError) as raised:
        load_cluster(lab, 4)
    assert said in str(raised.value)
    assert check_profile(lab) != []


def test_nics_that_do_not_add_up_are_reported(lab: Path) -> None:
    lab.write_text(lab.read_text().replace("value: 12.5", "value: 25"))
    (problem,) = check_profile(lab)
    assert "node.nics x node.nic_bandwidth is 12.5 GB/s, but scaleout.bandwidth is 25 GB/s" in problem


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("topology: fat-tree", "topology: dragonfly", "topology: 'dragonfly' is not allowed; use fat-tree, nvswitch"),
        ("topology: fat-tree\n", "", "the key `topology` is missing"),
        ("  nodes: {value: 8", "  nodes: {value: 6", "pod.nodes=6 is not a multiple of leaf.nodes=4"),
        ("oversubscription: {value: 4", "oversubscription: {value: 1", "at least leaf.oversubscription"),
        ("oversubscription: {value: 4", "oversubscription: {value: 0.5", "0.5 ratio must be at least 1"),
        (
            "value: 8, unit: count, basis: measured, source: counted}\nleaf",
            "value: 8, unit: count}\nleaf",
            "`source` is",
        ),
        ("rail_optimised: false", "rail_optimised: perhaps", "rail_optimised: expected `bool`"),
    ],
)
def test_bad_fabrics_are_refused(lab: Path, old: str, new: str, said: str) -> None:
    tree = lab.parent / "tree.yaml"
    assert old in tree.read_text()
    tree.write_text(tree.read_text().replace(old, new))
    (problem,) = check_profile(tree)
    assert said in problem
    with pytest.raises(InputError):
        load_cluster(lab, 4)


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [
        ("dgx-h100", 100, "num_gpus=100 does not fill whole nodes of dgx-h100 (8 GPUs each); use 96 or 104"),
        ("dgx-h100", 9, "use 8 or 16"),
        ("gb200-nvl72", 70, "does not fill whole nodes of gb200-nvl72 (4 GPUs each); use 68 or 72"),
        ("dgx-h100", 0, "num_gpus=0 must be between 1 and"),
        ("dgx-h100", -8, "num_gpus=-8 must be between 1 and"),
        ("dgx-h100", 8 * 10**12, "num_gpus=8000000000000 must be between 1 and 10000000"),
        ("dgx-h100", 8.0, "num_gpus=8.0 is not a whole number"),
        ("dgx-h100", True, "num_gpus=True is not a whole number"),
        ("dgx-h100", "8", "num_gpus='8' is not a whole number"),
        ("tinybox-green", 12, "num_gpus=12 is too many: the 6 GPUs of tinybox-green have no known network to others"),
        ("selene", 8192, "num_gpus=8192 is too many: the 4480 GPUs of selene is all there is; use at most 4480"),
        ("tpu-v4-pod", 8192, "num_gpus=8192 is too many: the 4096 GPUs of tpu-v4-pod have no known network"),
        ("tpu-v5e-pod", 8 * 17, "no slice of torus-2d-16 has 136 chips"),
        ("tpu-v5e-pod", 264, "num_gpus=264 does not divide into 2 equal slices of tpu-v5e-pod; use a multiple of 16"),
        ("dgx-h10", 8, "unknown cluster 'dgx-h10'; did you mean"),
        ("h100-sxm", 8, "h100-sxm is an accelerator; a cluster holding it: dgx-h100"),
        ("no-such.yaml", 8, "no-such.yaml does not exist"),
    ],
)
def test_sizes_and_names_that_are_refused(name: str, gpus: int, said: str) -> None:
    with pytest.raises(InputError) as raised:
        load_cluster(name, gpus)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", list_profiles("systems"))
@settings(max_examples=20)
@given(data=st.data())
def test_accepted_sizes_are_whole_nodes_in_whole_domains(name: str, data: st.DataObject) -> None:
    node = load_cluster(name, 1).gpus_per_node
    gpus = data.draw(st.integers(1, 40)) * data.draw(st.sampled_from([1, node]))
    try:
        cluster = load_cluster(name, gpus)
    except InputError:
        limit = load_cluster(name, 1).max_gpus
        torus = load_cluster(name, 1).torus_shape != ()
        assert torus or (gpus > node and gpus % node) or (limit is not None and gpus > limit)
        return
    assert cluster.num_nodes == max(1, gpus // node)
    assert gpus <= node or gpus % node == 0
    # Evenly spread domains hold everything, none more than it has, and one domain fewer would not do.
    assert cluster.gpus_per_domain <= cluster.domain_gpus
    assert cluster.gpus_per_domain * cluster.num_domains >= gpus > cluster.domain_gpus * (cluster.num_domains - 1)
    if cluster.torus_shape:
        product = 1
        for axis in cluster.torus_shape:
            product *= axis
        assert product == cluster.gpus_per_domain


@pytest.mark.parametrize(
    ("name", "gpus", "domains", "each"),
    [
        ("gb200-nvl72", 64, 1, 64),
        ("gb200-nvl72", 72, 1, 72),
        ("gb200-nvl72", 76, 2, 40),
        ("gb200-nvl72", 256, 4, 64),
        ("gb200-nvl72", 5120, 72, 72),
        ("dgx-h100", 4, 1, 4),
        ("dgx-h100", 512, 64, 8),
        ("tpu-v5e-pod", 8192, 32, 256),
    ],
)
def test_nodes_are_spread_evenly_over_domains(name: str, gpus: int, domains: int, each: int) -> None:
    cluster = load_cluster(name, gpus)
    assert (cluster.num_domains, cluster.gpus_per_domain) == (domains, each)


def test_tapers_of_published_networks() -> None:
    assert load_cluster("meta-grand-teton", 16384).taper == ((3072, 7.0),)
    assert load_cluster("meta-grand-teton", 24576).max_gpus == 24576
    assert load_cluster("abci-v", 512).taper == ((34 * 4, 3.0),)
    assert load_cluster("dgx-h100", 16384).taper == ()


def test_clusters_compare_hash_and_travel() -> None:
    one, two = load_cluster("dgx-h100", 64), load_cluster("HGX H100", 64)
    assert one == two
    assert hash(one) == hash(two)
    assert one != load_cluster("dgx-h100", 128)
    assert pickle.loads(pickle.dumps(one)) == one


def test_described_clusters_take_the_rest_from_the_reference() -> None:
    cluster = make_cluster(accelerator="h100-sxm", num_gpus=512)
    reference = load_cluster("dgx-h100", 512)
    assert replace(cluster, name=reference.name) == reference


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        # the links are the accelerator's own: an A800 has 8 NVLinks, an H800 too
        ({"accelerator": "a800-sxm-80gb"}, {"scaleup_bandwidth": 200e9, "scaleup_topology": "nvswitch"}),
        ({"accelerator": "mi355x"}, {"scaleup_bandwidth": 535.5e9, "scaleup_topology": "mesh"}),
        # of Gaudi's 24 ports 21 stay in the node
        ({"accelerator": "gaudi2"}, {"scaleup_bandwidth": 262.5e9, "nic_attach": "accelerator"}),
        # the reference with as many devices a node: a mesh of 4, a cube of 8, a switch of 16
        ({"accelerator": "v100-sxm-32gb", "gpus_per_node": 4}, {"scaleup_topology": "mesh", "domain_gpus": 4}),
        ({"accelerator": "v100-sxm-32gb", "gpus_per_node": 8}, {"scaleup_topology": "cube-mesh"}),
        ({"accelerator": "v100-sxm-32gb", "gpus_per_node": 16}, {"scaleup_topology": "nvswitch", "domain_gpus": 16}),
        # another site's taper is not this one's
        ({"accelerator": "v100-sxm-16gb", "gpus_per_node": 4}, {"taper": (), "scaleout_bandwidth_per_node": 25e9}),
        # half the node has half the NICs
        (
            {"accelerator": "h100-sxm", "gpus_per_node": 4},
            {"scaleout_bandwidth_per_node": 200e9, "nics_per_node": 4, "domain_gpus": 4},
        ),
        (
            {"accelerator": "a100-sxm-80gb", "scaleout_bandwidth_per_node": 50e9, "scaleout_link": "roce"},
            {"scaleout_bandwidth_per_node": 50e9, "scaleout_link": "roce", "nics_per_node": 8},
        ),
        ({"accelerator": "gb200"}, {"gpus_per_node": 4, "domain_gpus": 72, "scaleout_bandwidth_per_node": 200e9}),
        ({"accelerator": "gb200", "domain_gpus": 36}, {"domain_gpus": 36}),
        (
            {"accelerator": "tpu-v5p", "domain_gpus": 16},
            {"domain_gpus": 16, "torus_shape": (2, 2, 4), "num_domains": 1},
        ),
        # half a mesh board: every pair keeps its link of 64 GB/s
        ({"accelerator": "mi300x", "gpus_per_node": 4}, {"scaleup_bandwidth": 3 * 64e9, "domain_gpus": 4}),
    ],
)
def test_described_clusters(given_: dict[str, object], expected: dict[str, object]) -> None:
    cluster = make_cluster(**{"num_gpus": 16, **given_})  # type: ignore[arg-type]
    for attribute, value in expected.items():
        assert getattr(cluster, attribute) == value, attribute


def test_bridges_join_pairs_only() -> None:
    pair = make_cluster(accelerator="h100-nvl", num_gpus=2, gpus_per_node=2)
    assert (pair.scaleup_link, pair.scaleup_bandwidth) == ("nvlink4", 300e9)
    box = make_cluster(accelerator="h100-nvl", num_gpus=8, gpus_per_node=8)
    assert (box.scaleup_link, box.scaleup_bandwidth, box.scaleup_topology) == ("pcie5", 63e9, "pcie")


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"accelerator": "gh200-96gb"}, "give gpus_per_node"),
        (
            {"accelerator": "l40s", "gpus_per_node": 8},
            "num_gpus=16 is too many: the 8 GPUs of l40s cluster have no known",
        ),
        (
            {"accelerator": "l40s", "gpus_per_node": 8, "scaleout_bandwidth_per_node": 25e9},
            "names no reference system to take scaleout_link from; give one of",
        ),
        ({"accelerator": "l40s", "gpus_per_node": 8, "scaleout_link": "roce"}, "needs scaleout_bandwidth_per_node"),
        ({"accelerator": "h100-sxm", "gpus_per_node": 0}, "gpus_per_node=0 must be between"),
        (
            {"accelerator": "h100-sxm", "gpus_per_node": 6},
            "does not fill whole nodes of h100-sxm cluster (6 GPUs each)",
        ),
        ({"accelerator": "h100-sxm", "domain_gpus": 12}, "domain_gpus=12 is not a multiple of gpus_per_node=8"),
        ({"accelerator": "h100-sxm", "scaleout_bandwidth_per_node": -1.0}, "must be above zero"),
        ({"accelerator": "h100-sxm", "scaleout_bandwidth_per_node": float("nan")}, "must be above zero"),
        ({"accelerator": "v100-sxm-16gb", "gpus_per_node": 16}, "a cube mesh joins 8 GPUs, not 16"),
    ],
)
def test_described_clusters_that_are_refused(given_: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as raised:
        make_cluster(**{"num_gpus": 16, **given_})  # type: ignore[arg-type]
    assert said in str(raised.value)


def test_a_card_without_links_needs_a_description(lab: Path) -> None:
    card = load_accelerator(lab.parent / "card.yaml")
    with pytest.raises(InputError, match="card states no links between devices; describe the cluster in a YAML file"):
        make_cluster(accelerator=card, num_gpus=8, gpus_per_node=8)


@pytest.mark.parametrize(
    ("fabric", "chips", "shape"),
    [
        ("torus-2d-16", 256, (16, 16)),
        ("torus-2d-16", 128, (8, 16)),
        ("torus-2d-16", 8, (2, 4)),
        ("torus-2d-32", 1024, (32, 32)),
        ("torus-3d", 64, (4, 4, 4)),
        ("torus-3d", 128, (4, 4, 8)),
        ("torus-3d", 6144, (16, 16, 24)),
        ("torus-3d", 8960, (16, 20, 28)),
        ("torus-3d", 9216, (16, 24, 24)),
    ],
)
def test_slices_have_the_published_shapes(fabric: str, chips: int, shape: tuple[int, ...]) -> None:
    assert load_fabric(fabric).slice_shape(chips) == shape  # type: ignore[union-attr]


def test_a_link_of_ones_own_is_found_beside_the_system(tmp_path: Path) -> None:
    profiles = profiles_dir()
    link = (profiles / "links" / "infiniband.yaml").read_text(encoding="utf-8")
    (tmp_path / "my-net.yaml").write_text(link.replace("name: infiniband", "name: my-net"), encoding="utf-8")
    system = (profiles / "systems" / "dgx-h100.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(system.replace("link: infiniband", "link: my-net.yaml"), encoding="utf-8")
    cluster = load_cluster(tmp_path / "mine.yaml", 64)
    assert load_link(cluster.scaleout_link).name == "my-net"
    assert check_profile(tmp_path / "mine.yaml") == []
    (tmp_path / "mine.yaml").write_text(system.replace("link: infiniband", "link: gone.yaml"), encoding="utf-8")
    assert any("gone.yaml does not exist" in problem for problem in check_profile(tmp_path / "mine.yaml"))
