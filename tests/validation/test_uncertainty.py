"""Error ranges from validated runs, and the profile that estimates read."""

import math

import pytest

from simllm.errors import InputError
from simllm.hardware.profiles import load_profile_file, profiles_dir
from simllm.training.uncertainty import ErrorRange, UncertaintyProfile
from simllm.validation.uncertainty import Judged, main, measure_uncertainty, write_uncertainty


def judged(ratio: float, gpu: str = "h100-sxm", part: str = "one") -> Judged:
    return Judged(ratio=ratio, accelerator=gpu, part=part)


MEMORY = [judged(1.0)]


def test_percentiles_overall_and_by_device():
    times = [judged(0.9 + i / 100) for i in range(11)]  # 0.90 ... 1.00
    times += [judged(2.0, "v100-sxm-32gb") for _ in range(7)]  # too few for a range of their own
    profile = measure_uncertainty(times, MEMORY, "hand-made")
    assert profile.by_accelerator == {"h100-sxm": ErrorRange(low=0.902, high=0.998, runs=11)}
    assert profile.overall.runs == 18
    assert profile.overall.low == pytest.approx(0.909)  # 0.9 places into 0.90, 0.91, 0.92, ...
    assert profile.overall.high == 2.0
    assert profile.of("h100-sxm").high == 0.998
    assert profile.of("v100-sxm-32gb") == profile.overall


def test_coverage_judges_a_part_by_the_others():
    # Part two lies inside what part one gives, 0.9 to 1.1 less the tails; of part one, what part two gives covers 1.0.
    times = [judged(ratio, "x", "one") for ratio in (0.9, 1.0, 1.1)] + [judged(1.0, "x", "two")] * 3
    assert measure_uncertainty(times, MEMORY, "hand-made").coverage == pytest.approx(4 / 6, abs=1e-3)
    assert measure_uncertainty(times, MEMORY, "hand-made").memory_coverage == 0.0  # one part judges nothing


def test_a_range_holds_the_prediction():
    assert ErrorRange(low=1.1, high=1.3, runs=9).around(10.0) == (10.0, 13.0)


def test_nothing_measured_is_refused():
    with pytest.raises(InputError, match="no run has both"):
        measure_uncertainty([], MEMORY, "nothing")


def test_the_written_profile_is_read_back(tmp_path):
    profile = measure_uncertainty([judged(0.8 + i / 20) for i in range(9)], MEMORY, "hand-made")
    path = tmp_path / "uncertainty.yaml"
    write_uncertainty(profile, path)
    assert load_profile_file(path, UncertaintyProfile) == profile
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_leaves_nothing_behind(tmp_path):
    profile = measure_uncertainty([judged(1.0)], MEMORY, "hand-made")
    with pytest.raises(InputError, match="cannot be written"):
        write_uncertainty(profile, tmp_path / "nowhere" / "uncertainty.yaml")
    assert list(tmp_path.iterdir()) == []


def test_the_command(table, tmp_path, capsys):
    out = tmp_path / "out.yaml"
    assert main([str(table({"measured_peak_mem_gb": "50"})), str(out)]) == 0
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
    # Eight of ten were asked for; the share is that of runs in intervals made from other runs.
    assert 0.75 <= shipped.coverage <= 0.85
    assert 0.75 <= shipped.memory_coverage <= 0.85
