"""Whole runs, sensitivity, pages and traces from the command line: keys, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ESTIMATE = "estimate llama-3-8b --cluster dgx-h100 --gpus 16 --tp 2 --pp 2 --global-batch-size 64"
PLAN = "plan llama-3-8b --cluster dgx-h100 --gpus 8 --global-batch-size 16 --top 2"
RUN = "--tokens 1T --mtbf 40000 --restart 5 --storage-bandwidth 100GB --checkpoint-interval 30 --node-power 1.4"
OWN = f"{RUN} --pue 1.1 --grid-intensity 0.25 --price-per-gpu-hour 2.5"


def test_a_run_with_failures(cli) -> None:
    answer = cli(f"{ESTIMATE} {OWN} --json").json
    run = answer["training_run"]
    failing = run["with_failures"]
    assert run["usd"] == pytest.approx(2.5 * run["gpu_hours"])
    assert run["kwh"] == pytest.approx(run["gpu_hours"] * 0.7 * 1.4 * 1.1)
    assert run["kg_co2e"] == pytest.approx(run["kwh"] * 0.25)
    assert failing["gpu_mtbf_s"] == 40000 * 3600
    assert failing["job_mtbf_s"] == 40000 * 3600 / 16
    assert failing["checkpoint_interval_s"] == 1800
    assert failing["checkpoint_s"] == pytest.approx(failing["checkpoint_bytes"] / 1e11)
    assert failing["restart_s"] == pytest.approx(300 + failing["checkpoint_s"])
    assert failing["sources"] == {}
    low, high = failing["goodput_interval"]
    assert low < failing["goodput"] < high < 1
    assert failing["days"] == pytest.approx(run["days"] / failing["goodput"])
    text = cli(f"{ESTIMATE} {OWN}").out
    assert "The whole run  1T tokens" in text
    assert f"{failing['goodput']:.1%}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_sensitivity_of_an_estimate(cli) -> None:
    answer = cli(f"{ESTIMATE} --sensitivity --json").json
    changes = {change["what"]: change for change in answer["sensitivity"]}
    assert list(changes) == [
        "FLOP rate",
        "memory bandwidth",
        "memory",
        "nvlink4 bandwidth",
        "infiniband bandwidth",
        "batch",
        "sequence",
    ]
    assert all(change["best_plan"] is None for change in changes.values())
    rate = changes["FLOP rate"]
    assert rate["factor"] == 1.1
    assert rate["same_plan"]["step_time_s"] < answer["step_time_s"]
    assert 0.3 < rate["elasticity"] < 1


def test_sensitivity_of_a_search(cli) -> None:
    result = cli(f"{PLAN} --sensitivity")
    assert "What would help" in result.out
    assert "best plan" in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_plans_against_the_first(cli) -> None:
    plans = cli(f"{PLAN} --json").json["plans"]
    assert "against_first_s" not in plans[0]
    slower = plans[1]["step_time_s"] - plans[0]["step_time_s"]
    assert sum(plans[1]["against_first_s"].values()) == pytest.approx(slower)
    assert sum(plans[0]["time"]["by_resource"].values()) == pytest.approx(plans[0]["step_time_s"])


def test_files(cli, tmp_path: Path) -> None:
    page, trace, picture = tmp_path / "page.html", tmp_path / "trace.json", tmp_path / "plans.png"
    files = ["--report", str(page), "--trace", str(trace), "--plot", str(picture)]
    result = cli(*PLAN.split(), *files)
    assert result.status == 0, result.err
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert str(page) in page.read_text()  # the command that made it
    assert json.loads(trace.read_text())["traceEvents"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = {file: file.read_bytes() for file in (page, trace, picture)}
    for option, file in (("--report", page), ("--trace", trace), ("--plot", picture)):
        for command in (PLAN, ESTIMATE):
            refused = cli(*command.split(), option, str(file))
            assert refused.status == 2
            assert f"{option}={file} exists" in refused.err
            assert "--overwrite" in refused.err
            assert refused.out == ""
    assert {file: file.read_bytes() for file in before} == before
    assert cli(*ESTIMATE.split(), *files, "--overwrite").status == 0
    assert page.read_bytes() != before[page]
    assert json.loads(trace.read_text())["otherData"]["model"] == "llama-3-8b"


def test_an_answer_that_exists(cli, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    answer.write_text("mine")
    refused = cli(*ESTIMATE.split(), "-o", str(answer))
    assert (refused.status, answer.read_text()) == (2, "mine")
    assert cli(*ESTIMATE.split(), "-o", str(answer), "--overwrite").status == 0
    assert json.loads(answer.read_text())["fits"]


@pytest.mark.parametrize(
    "line",
    [
        "models list",
        "models show gpt2",
        "models compare gpt2 llama-3-8b",
        "hardware list",
        "hardware show h100-sxm",
        "collective all_reduce --size 1MB --cluster dgx-h100 --gpus 8",
        "validate runs runs.csv",
        "validate collectives runs.csv",
        "calibrate collectives runs.csv",
    ],
)
def test_every_command_keeps_what_is_there(cli, tmp_path: Path, line: str) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    result = cli(*line.split(), "-o", str(mine))
    assert result.status == 2
    assert f"--output={mine} exists" in result.err
    assert mine.read_text() == "mine"


def test_page_when_nothing_fits(cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    nothing = "plan llama-3-70b --cluster dgx-h100 --gpus 8 --global-batch-size 8 --sensitivity"
    result = cli(*nothing.split(), "--report", str(page))
    assert result.status == 1
    assert "No plan fits." in page.read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--price 2", ["--price describes a whole run", "--tokens"]),
        ("--pue 1.2 --mtbf 1000", ["--mtbf, --pue describe a whole run", "--tokens"]),
        ("--tokens 1T --pue 0.9", ["--pue=0.9", "at least 1"]),
        ("--tokens 1T --pue many", ["--pue=many", "not a quantity"]),
        ("--tokens 1T --mtbf 0", ["--mtbf=0", "above zero"]),
        ("--tokens 1T --mtbf 0.001", ["never ends", "MTBF"]),
        ("--tokens 1T --storage-bandwidth fast", ["--storage-bandwidth=fast"]),
        ("--tokens 1T --checkpoint-interval -5", ["--checkpoint-interval=-5", "above zero"]),
        ("--report page.pdf", ["--report=page.pdf", ".html"]),
        ("--trace trace.txt", ["--trace=trace.txt", ".json"]),
        ("--report gone/page.html", ["--report=gone/page.html", "no folder 'gone'"]),
    ],
)
@pytest.mark.parametrize("command", [ESTIMATE, PLAN], ids=["estimate", "plan"])
def test_refused(cli, command: str, words: str, expected: list[str]) -> None:
    result = cli(f"{command} {words}")
    assert result.status == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in expected:
        assert text in result.err
