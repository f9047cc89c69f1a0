"""Folds, and predictions of what was left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from simllm.errors import InputError
from simllm.network.measurements import Sweep
from simllm.validation.collective_rows import read_rows
from simllm.validation.cross_validation import deal, left_out
from simllm.validation.link_fit import measured_sweeps

PUBLISHED = Path(__file__).parents[1] / "published"


def rings_of_h100() -> list[Sweep]:
    found = measured_sweeps(read_rows(PUBLISHED / "collectives.csv"))
    return [
        sweep
        for sweep in found.sweeps
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
    found = left_out(sweeps, "sweep", 3)
    assert sorted(one.sweep.name for one in found) == sorted(sweep.name for sweep in sweeps)
    assert all(one.class_seen for one in found)
    errors = [abs(p / m - 1) for one in found for p, m in zip(one.times_s, one.sweep.times_s, strict=True)]
    assert len(errors) == sum(len(sweep.sizes_bytes) for sweep in sweeps)
    assert median(errors) < 0.08


def test_a_left_out_sweep_is_not_seen() -> None:
    """A sweep that is ten times too slow is predicted as if it were sane."""
    sweeps = rings_of_h100()
    odd = replace(sweeps[0], times_s=tuple(10 * seconds for seconds in sweeps[0].times_s))
    found = {one.sweep.name: one for one in left_out([odd, *sweeps[1:]], "sweep", 3)}
    ratio = [p / m for p, m in zip(found[odd.name].times_s, odd.times_s, strict=True)]
    assert 0.06 < sorted(ratio)[len(ratio) // 2] < 0.14


def test_systems_left_out_are_unseen() -> None:
    found = left_out(rings_of_h100(), "system", 2)
    assert not any(one.system_seen for one in found)
    with pytest.raises(InputError, match="neither 'sweep' nor 'system'"):
        left_out(rings_of_h100(), "gpu", 2)  # type: ignore[arg-type]
