"""Predictions of published runs do not get worse unnoticed."""

import json
from pathlib import Path

import pytest

from simllm.validation.runs import validate_runs

PUBLISHED = Path(__file__).parents[1] / "published"
HELD_TO = json.loads((PUBLISHED / "accuracy.json").read_text(encoding="utf-8"))
#: Percentage points that an error may grow: noise of rounding, not of a change.
SLACK = 0.1


@pytest.fixture(scope="module")
def summary():
    return validate_runs(PUBLISHED / "training_runs.csv").summary


def errors(score):
    return {name: score[name] for name in score if name.endswith("absolute_percentage_error")}


@pytest.mark.parametrize("tier", ["A", "B"])
def test_step_times_are_as_good_as_committed(summary, tier):
    for name, held in errors(HELD_TO["step_time"][tier]).items():
        assert summary["tier"][tier][name] <= held + SLACK, f"{name} of tier {tier}: python benchmarks/accuracy.py"


def test_peak_memory_is_as_good_as_committed(summary):
    for name, held in errors(HELD_TO["peak_memory"]).items():
        assert summary["memory"]["overall"][name] <= held + SLACK, name


def test_no_run_is_lost(summary):
    assert summary["ok"] >= HELD_TO["priced"]
