"""Where NCCL changes the protocol of a ring inside a domain, by its own model and in published sweeps."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from math import inf
from pathlib import Path

import msgspec
import pytest

from simllm.hardware.cluster import load_cluster
from simllm.hardware.links import Tuning, list_links, load_link
from simllm.network.fabric import fabric
from simllm.network.group import Group
from simllm.network.ring import ring
from simllm.network.tuning import reaches
from simllm.validation.collective_rows import read_rows

PUBLISHED = Path(__file__).parents[1] / "published" / "collectives.csv"


def tuning(name: str) -> Tuning:
    found = load_link(name).tuning
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("link", "ranks", "passes", "expected"),
    [
        # LL 6.6 + 3 * 0.6 us and 0.75 B / 141 GB/s; Simple 8.4 + 3 * 3.4 us and 0.75 B / 360 GB/s: 10.2 us apart.
        ("nvlink4", 4, 1, {"LL": 10.2e-6 / (0.75 / 141e9 - 0.75 / 360e9)}),
        # LL128 14 + 14 * 1.9 us at 331 GB/s comes between: 25.6 us above LL, 15.4 us below Simple.
        (
            "nvlink4",
            8,
            2,
            {"LL": 25.6e-6 / (1.75 / 141e9 - 1.75 / 331.2e9), "LL128": 15.4e-6 / (1.75 / 331.2e9 - 1.75 / 360e9)},
        ),
        # No LL128 over PCIe; two devices below one switch have the whole link, groups across the host half of it.
        ("pcie5", 2, 1, {"LL": 6.5e-6 / (0.5 / 24e9 - 0.5 / 48e9)}),
        ("pcie5", 8, 1, {"LL": 34.7e-6 / (0.875 / 12e9 - 0.875 / 24e9)}),
        # Before: an all-reduce in LL at a quarter of the rings, a gather at a third.
        (
            "nvlink3-nccl-2-10",
            2,
            2,
            {"LL": 9.26e-6 / (1 / 58.75e9 - 1 / 216.2e9), "LL128": 1.4e-6 / (1 / 216.2e9 - 1 / 235e9)},
        ),
        ("nvlink3-nccl-2-10", 2, 1, {"LL": 7.73e-6 / (1.5 / 235e9 - 0.5 / 235e9)}),
    ],
)
def test_protocols_end_where_the_next_costs_less(
    link: str, ranks: int, passes: int, expected: dict[str, float]
) -> None:
    assert reaches(tuning(link), ranks, passes) == pytest.approx(expected | {"Simple": inf})


def test_a_ring_inside_a_domain_uses_what_the_library_takes() -> None:
    cluster = load_cluster("dgx-h100", 16)
    found = {terms.protocol: terms.most_bytes for terms in ring(fabric(cluster, Group(size=4)), 1)}
    assert found == reaches(tuning("nvlink4"), 4, 1)
    assert "LL128" not in found
    across = [terms.protocol for terms in ring(fabric(cluster, Group(size=16)), 1)]
    assert across == ["LL", "LL128", "Simple"]


def test_published_sweeps_step_up_where_it_says() -> None:
    """Among 2 or 4 ranks that skip LL128 the largest rise from one size to the next is across the end of LL."""
    sweeps: dict[tuple[str, str, str], dict[float, float]] = defaultdict(dict)
    for row in read_rows(PUBLISHED):
        system, library = row.text("system"), row.text("library")
        if library.startswith("NCCL") and system in ("1 node HGX H100", "1 node A100-SXM4-80GB", "1 node HGX B300"):
            key = (row.text("gpu"), row.text("collective"), row.text("n_gpus").removesuffix(".0"))
            sweeps[key][row.number("message_bytes") or 0.0] = row.number("time_us") or 0.0
    links = {"A100": "nvlink3", "H100": "nvlink4", "B300": "nvlink5"}
    agree = []
    for (gpu, collective, ranks), times in sweeps.items():
        if collective not in ("all_reduce", "all_gather", "reduce_scatter") or ranks not in ("2", "4"):
            continue
        passes = 2 if collective == "all_reduce" else 1
        reach = reaches(tuning(links[gpu[:4]]), int(ranks), passes)
        if "LL128" in reach:
            continue
        near = sorted(size for size in times if 2**18 <= size <= 2**23)
        steepest = max(pairwise(near), key=lambda sizes: times[sizes[1]] / times[sizes[0]])
        agree.append(steepest[0] <= reach["LL"] < steepest[1])
    assert len(agree) >= 8
    assert all(agree)


def test_only_links_inside_domains_have_one() -> None:
    assert {name for name in list_links() if load_link(name).tuning} >= {"nvlink3", "nvlink4", "nvlink5", "pcie4"}
    with pytest.raises(ValueError, match="tuning belong to the scale-up link"):
        msgspec.structs.replace(load_link("infiniband"), tuning=tuning("nvlink4")).__post_init__()
