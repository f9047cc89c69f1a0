"""`simllm validate kernels` and `simllm calibrate kernels`: no row lost, errors on shapes left out, files that read."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from simllm.cli import main
from simllm.errors import InputError
from simllm.kernels.profile import kernel_folder, own_kernel_profile
from simllm.kernels.schema import read_kernels
from simllm.validation.kernels import validate_kernels

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "published"
KERNELS = PUBLISHED / "kernels.csv"


def benchmark(name: str) -> ModuleType:
    """A script of the benchmarks folder as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(path: Path, keep: Callable[[dict[str, str]], bool], **more: str) -> Path:
    """Some published rows as a table of its own."""
    with KERNELS.open(newline="", encoding="utf-8") as file:
        rows = [row | more for row in csv.DictReader(file) if keep(row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_targets_on_all_published_shapes() -> None:
    """The shipped curves over the whole table; the profiles state the errors on shapes left out of each fit."""
    report = validate_kernels(KERNELS, left_out=False)
    summary = report.summary
    assert (summary["rows"], summary["ok"], summary["unsupported"]) == (2647, 2571, 76)
    assert [row.id for row in report.rows] == [str(number + 1) for number in range(2647)]
    assert all(row.reason for row in report.rows if row.status == "unsupported")
    assert summary["regime"]["matmul >= 1024"]["median_absolute_percentage_error"] < 4
    assert summary["regime"]["attention >= 1024"]["median_absolute_percentage_error"] < 4
    assert summary["kind"]["attention backward"]["median_absolute_percentage_error"] < 3
    assert "left_out" not in summary
    # Groups but the regimes count the sizes that training is made of, each problem once.
    assert summary["overall"]["count"] == sum(group["count"] for group in summary["gpu"].values())


def test_shapes_left_out_of_the_fit(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    table = part(tmp_path / "part.csv", lambda row: row["gpu"] in ("H100-SXM5-80GB", "A100-80GB-PCIe", "A100-40GB"))
    report = validate_kernels(table)
    unseen, seen = report.summary["left_out"], report.summary
    assert unseen["kind"]["matmul"]["median_absolute_percentage_error"] < 6
    assert unseen["kind"]["attention forward"]["median_absolute_percentage_error"] < 10
    assert unseen["kind"]["attention backward"]["median_absolute_percentage_error"] < 10
    # Nothing is predicted better for not having been seen.
    assert unseen["overall"]["mean_absolute_percentage_error"] > seen["overall"]["mean_absolute_percentage_error"]
    never = [row for row in report.rows if row.fitted == "no"]
    assert {row.gpu for row in never} >= {"a100-sxm-40gb"}
    assert all(row.left_out_time_s == row.predicted_time_s for row in never)
    changed = [row for row in report.rows if row.fitted == "yes" and row.left_out_time_s != row.predicted_time_s]
    assert len(changed) > 300


def test_unfused_attention_is_priced_by_its_traffic() -> None:
    report = validate_kernels(PUBLISHED / "attention_papers.csv", left_out=False)
    unfused = report.errors_by("implementation")["unfused"]
    assert unfused.count == 16  # five sequences from 1024 on, two head sizes; masked ones were timed forward only
    assert unfused.median_absolute_percentage_error is not None
    assert unfused.median_absolute_percentage_error < 5


def test_every_shipped_figure_comes_out_of_the_script() -> None:
    """The script fits all devices again; no figure moves by 2 %."""
    pytest.importorskip("scipy")
    script = benchmark("calibrate_kernels")
    fits = script.fit_kernels(script.published_rows(), held_out=False)
    assert len(fits.profiles) == 17
    figures = 0
    for name, new in fits.profiles.items():
        shipped = read_kernels(kernel_folder() / f"{name}.yaml")
        assert script.moved(shipped, new) == []
        figures += len(list(script.figures(new)))
    assert figures == 338
    other = read_kernels(kernel_folder() / "b200.yaml")
    assert any("bf16.rate" in change for change in script.moved(other, fits.profiles["h100-sxm"]))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    table = part(tmp_path / "part.csv", lambda row: row["gpu"] == "A100-80GB-PCIe", surprise="1")
    picture = tmp_path / "errors.png"
    assert main(["validate", "kernels", str(table), "--no-left-out", "--json", "--plot", str(picture)]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(document) == {"rows", "summary"}
    assert {"id", "status", "reason", "measured_time_s", "predicted_time_s", "assumptions"} <= set(document["rows"][0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["validate", "kernels", str(table)]) == 0
    assert "median left out" in capsys.readouterr().out
    written = tmp_path / "mine.yaml"
    assert main(["calibrate", "kernels", str(table), "-o", str(written), "--no-left-out", "--plot", str(picture)]) == 0
    assert "bf16 matmul" in capsys.readouterr().out
    file = read_kernels(written)
    shipped = read_kernels(kernel_folder() / "a100-pcie-80gb.yaml")
    assert file.name == "mine"
    assert file.matmul["bf16"].rate.value == pytest.approx(shipped.matmul["bf16"].rate.value, rel=0.02)
    assert own_kernel_profile("a100-pcie-80gb", written).origin == "own"


def test_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("gpu,op\nh100-sxm,gemm\n")
    with pytest.raises(InputError, match="lacks the columns dtype, library"):
        validate_kernels(bad, left_out=False)
    two = part(tmp_path / "two.csv", lambda row: row["gpu"] in ("V100", "A100-80GB-PCIe"))
    assert main(["calibrate", "kernels", str(two), "-o", str(tmp_path / "one.yaml"), "--no-left-out"]) == 2
    assert "give a folder as --output" in capsys.readouterr().err
    none = part(tmp_path / "none.csv", lambda row: row["gpu"] == "A40")
    assert main(["calibrate", "kernels", str(none), "-o", str(tmp_path / "one.yaml"), "--no-left-out"]) == 2
    assert "no row that a curve can be fitted to; row 1: gpu=A40" in capsys.readouterr().err
    assert not (tmp_path / "one.yaml").exists()
