"""Error ranges from validated runs, and the profile that estimates read."""

import math

import pytest

from simllm.errors import InputError
from simllm.hardware.profiles import load_profile_file, profiles_dir
from simllm.training.uncertainty import ErrorRange, UncertaintyProfile
from simllm.validation.runs import RunResult, ValidationReport
from simllm.validation.uncertainty import error_range, main, measure_uncertainty, write_uncertainty


def run(key: str, gpu: str, ratio: float, tier: str = "A") -> RunResult:
    return RunResult(
        id=key,
        tier=tier,
        source="",
        framework="",
        gpu=gpu,
        config_key=key,
        status="ok",
        measured_step_time_s=10 * ratio,
        predicted_step_time_s=10.0,
    )


def report(*rows: RunResult) -> ValidationReport:
    return ValidationReport(rows=rows)


def test_percentiles_overall_and_by_device():
    rows = [run(f"h{i}", "h100-sxm", 0.9 + i / 100) for i in range(11)]  # 0.90 ... 1.00
    rows += [run(f"v{i}", "v100-sxm-32gb", 2.0) for i in range(7)]  # too few for a range of their own
    rows += [run("c", "h100-sxm", 50.0, tier="C")]
    profile = measure_uncertainty(report(*rows), "hand-made")
    assert profile.by_accelerator == {"h100-sxm": ErrorRange(low=0.91, high=0.99, runs=11)}
    assert profile.overall.runs == 18
    assert profile.overall.low == pytest.approx(0.917)  # 1.7 places into 0.90, 0.91, 0.92, ...
    assert profile.overall.high == 2.0


def test_a_configuration_counts_once():
    assert error_range([run("a", "x", r).step_time for r in (1.0, 1.2, 9.0)]) == ErrorRange(low=1.2, high=1.2, runs=1)


def test_nothing_measured_is_refused():
    with pytest.raises(InputError, match="no run has both"):
        measure_uncertainty(report(), "nothing")


def test_the_written_profile_is_read_back(tmp_path):
    profile = measure_uncertainty(report(*(run(str(i), "h100-sxm", 0.8 + i / 20) for i in range(9))), "hand-made")
    path = tmp_path / "uncertainty.yaml"
    write_uncertainty(profile, path)
    assert load_profile_file(path, UncertaintyProfile) == profile
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_leaves_nothing_behind(tmp_path):
    profile = measure_uncertainty(report(run("a", "h100-sxm", 1.0)), "hand-made")
    with pytest.raises(InputError, match="cannot be written"):
        write_uncertainty(profile, tmp_path / "nowhere" / "uncertainty.yaml")
    assert list(tmp_path.iterdir()) == []


def test_the_command(table, tmp_path, capsys):
    out = tmp_path / "out.yaml"
    assert main([str(table({})), str(out)]) == 0
    assert load_profile_file(out, UncertaintyProfile).overall.runs == 1
    assert main([str(tmp_path / "none.csv"), str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([]) == 2


def test_the_shipped_profile_comes_from_the_published_runs():
    shipped = load_profile_file(profiles_dir() / "uncertainty.yaml", UncertaintyProfile)
    assert shipped.overall.runs > 600
    assert {"a100-sxm-80gb", "h100-sxm", "b200", "gb200"} <= set(shipped.by_accelerator)
    for found in (shipped.overall, *shipped.by_accelerator.values()):
        assert 0.3 < found.low <= found.high < 3
        assert not math.isnan(found.low)
