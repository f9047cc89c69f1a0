"""Prices against published nccl-tests and rccl-tests points, and the fit against its own result."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from simllm.hardware.cluster import load_cluster
from simllm.hardware.links import list_links, load_link
from simllm.hardware.profiles import check_profile, figures_of, profiles_dir
from simllm.network import Group, price, price_array
from simllm.network.calibrate import predict
from simllm.network.measurements import Sweep
from simllm.validation.collective_rows import read_rows
from simllm.validation.link_fit import measured_sweeps

PUBLISHED = Path(__file__).parents[1] / "published"


@lru_cache(maxsize=1)
def sweeps() -> tuple[Sweep, ...]:
    found = measured_sweeps(read_rows(PUBLISHED / "collectives.csv"))
    assert sum(number for reason, number in found.left_out.items() if reason.startswith("algorithm=vLLM")) == 230
    return found.sweeps


def errors(low: float, high: float) -> dict[str, list[float]]:
    """Signed relative errors of the predicted times by system, for sizes in [low, high)."""
    found: dict[str, list[float]] = {}
    for sweep in sweeps():
        times = price_array(sweep.operation, sweep.sizes_bytes, sweep.cluster, sweep.group, sweep.algorithm)
        assert times == pytest.approx(predict(sweep))
        for size, measured, predicted in zip(sweep.sizes_bytes, sweep.times_s, times, strict=True):
            if low <= size < high:
                found.setdefault(sweep.system, []).append(predicted / measured - 1)
    return found


def test_most_usable_points_can_be_priced() -> None:
    assert sum(len(sweep.sizes_bytes) for sweep in sweeps()) == 2368


@pytest.mark.parametrize(
    ("low", "high", "median", "p90"),
    [(64e6, 1e12, 0.03, 0.10), (65536, 64e6, 0.06, 0.30), (0, 65536, 0.04, 0.18)],
)
def test_errors_by_size(low: float, high: float, median: float, p90: float) -> None:
    absolute = np.abs(np.concatenate([np.array(found) for found in errors(low, high).values()]))
    assert np.median(absolute) < median
    assert np.quantile(absolute, 0.9) < p90


def test_large_messages_of_every_system() -> None:
    """From 256 MB on: the asymptotes. Printed by system with ``pytest -s``."""
    by_system = {system: float(np.median(found)) for system, found in errors(256e6, 1e12).items()}
    for system, error in sorted(by_system.items(), key=lambda item: abs(item[1])):
        print(f"{error:+7.1%}  {system}")
    absolute = np.abs(list(by_system.values()))
    assert len(by_system) >= 35
    assert np.median(absolute) < 0.03
    assert [system for system, error in by_system.items() if abs(error) > 0.15] == []


@pytest.mark.parametrize(
    ("cluster", "gpus", "floor_us"),
    [
        ("dgx-h100", 2, 5.9),
        ("dgx-h100", 4, 9.3),
        ("dgx-h100", 8, 15.6),
        ("dgx-a100", 2, 10.0),
        ("dgx-a100", 4, 13.9),
        ("dgx-a100", 8, 21.8),
        ("dgx-b200", 2, 10.2),
        ("dgx-b200", 4, 15.0),
        ("dgx-b200", 8, 25.2),
        ("mi300x-platform", 8, 13.7),
    ],
)
def test_floor_of_a_small_all_reduce(cluster: str, gpus: int, floor_us: float) -> None:
    """1 KB on one node, published floors; the same class of host differs by a few microseconds."""
    cost = price("all_reduce", 1024, load_cluster(cluster, 8), Group(size=gpus))
    assert cost.time_s * 1e6 == pytest.approx(floor_us, rel=0.15)


@pytest.mark.parametrize(
    ("nodes", "v100_us", "a100_us"), [(2, 23.3, 36.4), (4, 37.5, 50.2), (8, 49.5, 63.5), (16, 61.8, 74.1)]
)
def test_floor_grows_with_the_logarithm_of_nodes(nodes: int, v100_us: float, a100_us: float) -> None:
    """1 KB over InfiniBand on the ABCI nodes: about 12 us more for every doubling."""
    v100 = price("all_reduce", 1024, load_cluster("abci-v", 4 * nodes), Group(size=4 * nodes))
    a100 = price("all_reduce", 1024, load_cluster("abci-a", 8 * nodes), Group(size=8 * nodes))
    assert v100.time_s * 1e6 == pytest.approx(v100_us, rel=0.25)
    assert a100.time_s * 1e6 == pytest.approx(a100_us, rel=0.25)


def test_two_nodes_double_the_nics_and_more_do_not() -> None:
    """H100 with 8 NDR NICs: 470 to 489 GB/s of bus bandwidth on two nodes at 16 GB, 350 to 385 on many."""
    busbw = {n: price("all_reduce", 2**34, load_cluster("dgx-h100", 8 * n), Group(size=8 * n)).busbw for n in (2, 32)}
    assert busbw[2] == pytest.approx(480e9, rel=0.03)
    assert 350e9 < busbw[32] < 385e9


@pytest.mark.parametrize("name", list_links())
def test_profiles_are_sound(name: str) -> None:
    assert check_profile(profiles_dir() / "links" / f"{name}.yaml") == []
    link = load_link(name)
    assert link.name == name
    for path, figure in figures_of(link).items():
        assert not path.endswith("efficiency") or figure.si <= 1
        assert figure.basis != "measured" or "by class" not in figure.source
