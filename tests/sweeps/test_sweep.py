"""Sweeps: the same table whoever answers, nothing lost or doubled when they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pandas.testing import assert_frame_equal

import simllm
from simllm.cli import main
from simllm.errors import InputError
from simllm.sweeps import InterruptedSweepError, WorkerLostError, answer
from simllm.sweeps.journal import journal_path
from tests.sweeps.test_cells import AXES

PLANS = {"plans": [{"tp": 2}, {"tp": 3}, {"pp": 2, "vpp": 2, "recompute": "full"}]}
#: Enough cells that a sweep is still going when it is killed.
MANY: dict[str, Any] = {
    "models": "llama-2-7b",
    "clusters": "dgx-h100",
    "gpus": [8, 16, 32],
    "seq_len": [1024 * n for n in range(1, 41)],
    "global_batch_size": [64, 128, 256],
    "plans": [{"tp": 2}, {"tp": 4}],
}


@pytest.fixture(scope="module")
def expected() -> pd.DataFrame:
    """The whole of `MANY`, in one process and without a file."""
    return simllm.sweep(MANY, jobs=1)


def test_a_row_of_given_plans_is_their_estimate() -> None:
    table = simllm.sweep(AXES | PLANS, jobs=1)
    assert len(table) == 24
    row = table.iloc[0]
    plan = simllm.Plan(tp=2, dp=4, sequence_parallel=True, global_batch_size=64)
    found = simllm.estimate(
        simllm.Model.load("llama-2-7b"), simllm.Cluster.load("dgx-h100", 8), plan, simllm.Training(seq_len=4096)
    )
    assert row["step_time_s"] == found.step_time_s
    assert row["peak_memory_bytes"] == found.peak_memory_bytes
    assert row["mfu"] == found.mfu
    times = [name for name in table.columns if name.startswith("time_")]
    assert sum(row[name] for name in times) == pytest.approx(found.step_time_s, rel=1e-12)
    sizes = [name for name in table.columns if name.startswith("memory_") and name.endswith("_bytes")]
    assert sum(row[name] for name in sizes) == pytest.approx(found.peak_memory_bytes, rel=1e-12)


def test_questions_that_cannot_be_asked_are_rows_with_the_reason() -> None:
    table = simllm.sweep(AXES | PLANS | {"gpus": [8, 12]}, jobs=1)
    wrong = table[table["status"] == "refused"]
    assert len(table) == 24
    assert set(wrong["gpus"]) == {8, 12}
    reasons = " ".join(wrong["reason"])
    assert "num_gpus=12 does not fill whole nodes" in reasons
    assert "tp=3" in reasons
    assert table["tp"].dtype == "Int64"
    assert bool(wrong["step_time_s"].isna().all())


def test_a_row_without_plans_is_the_best_plan() -> None:
    axes = {"models": ["llama-2-7b", "llama-2-70b"], "clusters": "dgx-h100", "gpus": 8, "seq_len": 2048}
    table = simllm.sweep(axes | {"global_batch_size": 32}, jobs=1)
    best = simllm.plan(
        simllm.Model.load("llama-2-7b"),
        simllm.Cluster.load("dgx-h100", 8),
        simllm.Training(seq_len=2048),
        global_batch_size=32,
        top=1,
    ).plans[0]
    assert table.loc[0, "step_time_s"] == best.step_time_s
    assert (table.loc[0, "tp"], table.loc[0, "zero"]) == (best.plan.tp, best.plan.zero)
    assert table.loc[1, "status"] == "nothing fits"
    assert "out of memory" in str(table.loc[1, "reason"])


def test_processes_and_files_make_no_difference(tmp_path: Path) -> None:
    axes = AXES | PLANS
    alone = simllm.sweep(axes, jobs=1)
    assert_frame_equal(simllm.sweep(axes, tmp_path / "a.parquet", jobs=2), alone)
    simllm.sweep(axes, tmp_path / "a.csv", jobs=1)
    assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), alone)
    assert_frame_equal(pd.read_csv(tmp_path / "a.csv", dtype=dict(alone.dtypes)), alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.parquet"]


def test_dask_makes_no_difference() -> None:
    distributed = pytest.importorskip("distributed")
    axes = AXES | PLANS
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        assert_frame_equal(simllm.sweep(axes, dask=cluster.scheduler_address), simllm.sweep(axes, jobs=1))


def test_nobody_at_the_address() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="--dask"):
        simllm.sweep(AXES | PLANS, dask="nonsense://here")


# -- killed ----------------------------------------------------------------------------------------------------------


def _start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], Path]:
    """A sweep in a process of its own, three rows in."""
    axes, output = folder / "axes.yaml", folder / "out.csv"
    axes.write_text(yaml.safe_dump(MANY))
    root = str(Path(simllm.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "simllm", "sweep", str(axes), "-o", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        start_new_session=True,
        # A shell that runs the tests in the background ignores interrupts, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = journal_path(output)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process, output


def _children(pid: int) -> list[int]:
    """Processes whose parent a process is."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, expected: pd.DataFrame, how: signal.Signals) -> None:
    process, output = _start(tmp_path, "--jobs", "2")
    workers = _children(process.pid)
    assert len(workers) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # a terminal's Ctrl-C goes to the whole group
    else:
        process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert out == ""
    if how == signal.SIGINT:
        assert "stopped after" in err
        assert f"of {len(expected)} cells; finish with: simllm sweep" in err
        assert err.rstrip().endswith("--resume")
        assert "Traceback" not in err
    deadline = time.monotonic() + 30
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the sweep"
        time.sleep(0.02)
    assert not output.exists()
    done = journal_path(output).read_bytes().count(b"\n") - 1
    assert 3 <= done < len(expected)

    again: list[tuple[int, int, int]] = []
    with pytest.raises(InputError, match="unfinished sweep"):
        simllm.sweep(MANY, output, jobs=1)
    with pytest.raises(InputError, match="of another sweep"):
        simllm.sweep(MANY | {"gpus": 8}, output, jobs=1, resume=True)
    table = simllm.sweep(MANY, output, jobs=1, resume=True, progress=lambda *now: again.append(now))
    assert len(again) == len(expected) - done  # each cell once
    assert again[-1] == (len(expected), len(expected), done)
    assert_frame_equal(table, expected)
    assert_frame_equal(pd.read_csv(output, dtype=dict(expected.dtypes)), expected)
    assert not journal_path(output).exists()


def test_a_torn_last_line_is_answered_again(tmp_path: Path) -> None:
    axes, output = AXES | PLANS, tmp_path / "a.csv"
    stop_after(4, axes, output)
    journal = journal_path(output)
    content = journal.read_bytes()
    journal.write_bytes(content[:-7] + b" " * 9999)
    stop_after(5, axes, output, resume=True)
    assert len(journal.read_bytes().splitlines()) == 1 + 5
    table = simllm.sweep(axes, output, jobs=1, resume=True)
    assert_frame_equal(table, simllm.sweep(axes, jobs=1))
    stop_after(4, axes, tmp_path / "b.csv")
    broken = journal_path(tmp_path / "b.csv")
    lines = broken.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join([*lines[:2], b"}{\n", *lines[3:]]))
    with pytest.raises(InputError, match="damaged in line 3"):
        simllm.sweep(axes, tmp_path / "b.csv", jobs=1, resume=True)


def stop_after(rows: int, axes: dict[str, Any], output: Path, resume: bool = False) -> None:
    """Leave a sweep unfinished, as Ctrl-C does."""

    def stop(done: int, *_: int) -> None:
        if done == rows:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedSweepError) as stopped:
        simllm.sweep(axes, output, jobs=1, resume=resume, progress=stop)
    assert stopped.value.done == rows


def test_what_exists_is_not_overwritten_unasked(tmp_path: Path) -> None:
    axes, output = AXES | PLANS, tmp_path / "a.csv"
    output.write_text("precious")
    for options in ({}, {"resume": True}):
        with pytest.raises(InputError, match="exists"):
            simllm.sweep(axes, output, jobs=1, **options)  # type: ignore[arg-type]
    assert output.read_text() == "precious"
    simllm.sweep(axes, output, jobs=1, overwrite=True)
    assert len(pd.read_csv(output)) == 24
    with pytest.raises(InputError, match="one of them"):
        simllm.sweep(axes, output, overwrite=True, resume=True)
    with pytest.raises(InputError, match="whole number above zero"):
        simllm.sweep(axes, jobs=0)


def test_two_sweeps_do_not_share_an_output(tmp_path: Path) -> None:
    process, output = _start(tmp_path, "--jobs", "1")
    try:
        with pytest.raises(InputError, match="another sweep"):
            simllm.sweep(MANY, output, jobs=1, resume=True)
    finally:
        process.kill()
        process.communicate()


def test_a_worker_that_dies_stops_the_sweep(tmp_path: Path) -> None:
    victims: list[int] = []

    def kill(done: int, total: int, before: int) -> None:
        if not victims:
            ours = _children(os.getpid())
            command = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ours}
            victims.extend([pid for pid in ours if b"simllm.sweeps.serve" in command[pid]][:1])
            os.kill(victims[0], signal.SIGKILL)

    with pytest.raises(WorkerLostError, match="fewer processes"):
        simllm.sweep(MANY, tmp_path / "a.csv", jobs=2, progress=kill)
    assert journal_path(tmp_path / "a.csv").exists()
    assert not (tmp_path / "a.csv").exists()


def test_a_defect_is_not_taken_for_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(answer, "estimate", broken)
    with pytest.raises(ZeroDivisionError):
        simllm.sweep(AXES | PLANS, tmp_path / "a.csv", jobs=1)
    assert not (tmp_path / "a.csv").exists()


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in process."""

    def command(*words: str) -> tuple[int, str, str]:
        status = main(words)
        out, err = capsys.readouterr()
        return status, out, err

    return command


def test_the_command(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    axes, output = tmp_path / "axes.yaml", tmp_path / "out.parquet"
    axes.write_text(yaml.safe_dump(AXES | PLANS))
    status, out, _ = run("sweep", str(axes), "-o", str(output), "--jobs", "1")
    assert status == 0
    assert "24 cells  16 ok, 8 refused" in out
    assert len(pd.read_parquet(output)) == 24
    status, out, _ = run("sweep", str(axes), "-o", str(output), "--jobs", "1", "--overwrite", "--json")
    assert json.loads(out) == {
        "output": str(output),
        "cells": 24,
        "by_status": {"ok": 16, "nothing fits": 0, "refused": 8},
    }
    axes.write_text(yaml.safe_dump(AXES | {"plans": [{"tp": 3}]}))
    assert run("sweep", str(axes), "-o", str(tmp_path / "none.csv"), "--jobs", "1")[0] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-o", "{}/out.xlsx"), ["must end in .parquet or .csv"]),
        (("-o", "{}/no/out.csv"), ["there is no folder"]),
        (("-o", "{}/axes.yaml.csv", "--jobs", "0"), ["--jobs"]),
        (("-o", "{}/out.csv", "--jobs", "2", "--dask", "tcp://localhost:1"), ["--jobs", "--dask", "one of them"]),
        (("-o", "{}/out.csv", "--overwrite", "--resume"), ["one of them"]),
    ],
)
def test_wrong_options(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], options: tuple[str, ...], words: list[str]
) -> None:
    axes = tmp_path / "axes.yaml"
    axes.write_text(yaml.safe_dump(AXES | PLANS))
    status, out, err = run("sweep", str(axes), *(option.format(tmp_path) for option in options))
    assert status == 2
    assert out == ""
    assert all(word in err for word in words), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["axes.yaml"]
