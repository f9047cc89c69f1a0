"""Folds, and predictions of what was left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simllm.errors import InputError
from simllm.network.calibrate import Sweep, read_sweeps
from simllm.network.crossvalidate import REGIMES, cross_validate, deal, errors_by_regime

PUBLISHED = Path(__file__).parents[1] / "published"


def rings_of_h100() -> list[Sweep]:
    found, _ = read_sweeps(PUBLISHED / "collectives.csv", PUBLISHED / "collectives_systems.csv")
    return [
        sweep
        for sweep in found
        if sweep.system in ("1 node HGX H100", "1 node HGX H200")
        and sweep.operation in ("all_gather", "reduce_scatter")
    ]


def test_folds_are_even_and_do_not_depend_on_order() -> None:
    labels = [f"sweep {i}" for i in range(23)]
    dealt = deal(labels, 5)
    assert dealt == deal(reversed(labels), 5)
    sizes = [list(dealt.values()).count(fold) for fold in range(5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]
    for folds in (1, 24):
        with pytest.raises(InputError, match=f"folds={folds} must be at least 2 and at most 23"):
            deal(labels, folds)


def test_every_sweep_is_predicted_once_from_the_others() -> None:
    sweeps = rings_of_h100()
    found = cross_validate(sweeps, "sweep", 3)
    assert sorted(one.sweep.name for one in found) == sorted(sweep.name for sweep in sweeps)
    assert all(one.class_seen for one in found)
    large, middle, small = errors_by_regime(found)
    assert [error.regime for error in (large, middle, small)] == [name for name, _, _ in REGIMES]
    assert sum(error.points for error in (large, middle, small)) == sum(len(sweep.sizes_bytes) for sweep in sweeps)
    assert large.median < 0.05
    assert middle.median < 0.10
    assert small.median < 0.10


def test_a_left_out_sweep_is_not_seen() -> None:
    """A sweep that is ten times too slow is predicted as if it were sane."""
    sweeps = rings_of_h100()
    odd = replace(sweeps[0], times_s=tuple(10 * seconds for seconds in sweeps[0].times_s))
    found = {one.sweep.name: one for one in cross_validate([odd, *sweeps[1:]], "sweep", 3)}
    ratio = [p / m for p, m in zip(found[odd.name].times_s, odd.times_s, strict=True)]
    assert 0.06 < sorted(ratio)[len(ratio) // 2] < 0.14


def test_systems_left_out_are_unseen() -> None:
    found = cross_validate(rings_of_h100(), "system", 2)
    assert not any(one.system_seen for one in found)
    with pytest.raises(InputError, match="neither 'sweep' nor 'system'"):
        cross_validate(rings_of_h100(), "gpu", 2)  # type: ignore[arg-type]
