"""Every row of the published system table is in the catalog, figure by figure."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from simllm.hardware import list_profiles, load_accelerator, load_cluster
from simllm.hardware.profiles import find_profile, load_profile_file
from simllm.hardware.system import SystemProfile

PUBLISHED = Path(__file__).resolve().parents[1] / "published"
with (PUBLISHED / "systems.csv").open(newline="") as file:
    ROWS = {row["name"]: row for row in csv.DictReader(file)}

# The table's rows have the number of NICs of these only in words.
NICS_IN_WORDS = {"AWS p6e-gb200.36xlarge"}
# The catalog's name of the row, where the printed name is not among the aliases.
# Systems that stage transfers in host memory, and the part of the wire in the table that this reaches.
STAGED = {"ABCI 2.0 node (A)": 0.4}
NAMES = {"NVIDIA Selene": "selene", "NVIDIA Eos": "eos"}


def system(name: str) -> SystemProfile:
    return load_profile_file(find_profile("systems", name, "system"), SystemProfile)


@pytest.mark.parametrize("name", ROWS)
def test_row_equals_profile(name: str) -> None:
    row, profile = ROWS[name], system(NAMES.get(name, name))
    node, scaleup, scaleout = profile.node, profile.scaleup, profile.scaleout
    reached = STAGED.get(name, 1.0)
    assert (node.gpus.value, node.gpus.unit) == (int(row["gpus_per_node"]), "count")
    assert scaleup.domain_gpus.value == int(row["scaleup_domain_gpus"])
    assert (scaleup.bandwidth.value, scaleup.bandwidth.unit) == (float(row["scaleup_GBps_per_dir_per_gpu"]), "GB/s")
    assert scaleup.wiring == row["scaleup_topology"].strip()
    assert (node.host_link or "") == row["cpu_host_link"]
    if name not in NICS_IN_WORDS:
        assert (node.nics.value if node.nics else 0) == float(row["nics_per_node"] or 0)
        assert (node.nic_bandwidth.value if node.nic_bandwidth else 0) == reached * float(row["nic_Gbps"] or 0)
    if float(row["scaleout_GBps_per_dir_per_node"] or 0):
        assert scaleout is not None
        assert (scaleout.bandwidth.value, scaleout.bandwidth.unit) == (
            reached * float(row["scaleout_GBps_per_dir_per_node"]),
            "GB/s",
        )
        assert scaleout.network == row["scaleout_fabric"].strip()
        assert scaleout.wiring == row["scaleout_topology"].strip()
        assert (scaleout.oversubscription or "") == row["oversubscription"]
    else:
        assert scaleout is None
    if printed := re.match(r"[\d.]+", row["max_scale_nodes"]):
        nodes = {figure.value for figure in (profile.max_nodes, profile.published_nodes) if figure}
        expected = float(printed[0]) / (int(row["gpus_per_node"]) if "GPUs (recalled" in row["max_scale_nodes"] else 1)
        assert expected in nodes
    if row["provenance"] == "recalled":
        assert "recalled" in (scaleup.bandwidth.note or "")


@pytest.mark.parametrize("name", ROWS)
def test_the_accelerator_is_the_row_s(name: str) -> None:
    """The part named in the row, or one of its variants where the row names none."""
    card = load_accelerator(system(name).accelerator)
    printed = re.sub(r" \(DGX .*\)|-SXM\d.*|-\d+GB.*", "", ROWS[name]["accelerator"])
    part = {"TPU7x": "tpu-v7x"}.get(printed, printed.casefold().replace(" ", "-"))
    assert card.name == part or card.name.startswith(f"{part}-sxm")
    if size := re.search(r"(\d+)GB", ROWS[name]["accelerator"]):
        assert card.memory_bytes == int(size[1]) * 2**30


@pytest.mark.parametrize("name", list_profiles("systems"))
def test_one_node_of_every_system(name: str) -> None:
    profile = system(name)
    cluster = load_cluster(name, int(profile.node.gpus.value))
    assert (cluster.name, cluster.num_nodes) == (name, 1)
    assert cluster.accelerator == load_accelerator(profile.accelerator)
    assert cluster.scaleup_bandwidth == profile.scaleup.bandwidth.si
    assert cluster.figures["scaleup.bandwidth"] is profile.scaleup.bandwidth
    # Domains of one node are that node; no device sends more into its domain than all its links together carry.
    assert cluster.domain_gpus % cluster.gpus_per_node == 0
    assert cluster.accelerator.scaleup_bandwidth is not None
    assert cluster.scaleup_bandwidth <= cluster.accelerator.scaleup_bandwidth * (1 + 1e-12)
    if profile.scaleout:
        assert cluster.scaleout_bandwidth_per_node == profile.scaleout.bandwidth.si
        if profile.node.nics and profile.node.nic_bandwidth:
            assert profile.node.nics.si * profile.node.nic_bandwidth.si == profile.scaleout.bandwidth.si
        assert cluster.nics_per_node == (profile.node.nics.value if profile.node.nics else 1)
    else:
        assert (cluster.scaleout_link, cluster.scaleout_bandwidth_per_node, cluster.nics_per_node) == (None, None, 0)


@pytest.mark.parametrize("name", list_profiles("accelerators"))
def test_reference_systems_wire_their_accelerator_alike(name: str) -> None:
    """A reference system lends its wiring, so its links are of the accelerator's own class."""
    card = load_accelerator(name)
    for reference in card.reference_systems:
        assert system(reference).scaleup.link == card.scaleup_link
