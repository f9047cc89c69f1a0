"""`simllm calibrate --device`: raw files that go on, curves found again, profiles that every command reads."""

from __future__ import annotations

import csv
import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simllm.cli import main
from simllm.errors import InputError
from simllm.hardware import load_cluster
from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.hardware.profiles import check_profile
from simllm.kernels import Kernels, load_kernel_profile
from simllm.kernels.measurements import parse_rows, predict
from simllm.validation.measure.collectives import measure_collectives
from simllm.validation.measure.device import TorchDevice, open_device
from simllm.validation.measure.profiles import fit_machine, profile_texts
from simllm.validation.measure.raw import COLUMNS, RawFile, reduce_visits

OWNER = {"gpu": "a device", "source": "measured with torch 0"}


def raw(path: Path, **owner: str) -> RawFile:
    return RawFile(path, COLUMNS, OWNER | owner)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x-measured.csv"
    with raw(path).opened() as file:
        for key in ("a", "b", "a"):
            file.append({"key": key, "time_us": "3"})
    text = path.read_text()
    path.write_text(text + "half a li")  # killed while it wrote
    with raw(path).opened() as file:
        assert file.visits == {"a": 2, "b": 1}
        file.append({"key": "b", "time_us": "4"})
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["key"] for row in rows] == ["a", "b", "a", "b"]
    assert {row["gpu"] for row in rows} == {"a device"}
    assert {row["source"] for row in rows} == {"measured with torch 0"}


def test_a_raw_file_has_one_owner_and_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "x-measured.csv"
    with raw(path).opened() as file:
        file.append({"key": "a", "time_us": "3"})
        with pytest.raises(InputError, match="being written by another run"), raw(path).opened():
            pass
    with pytest.raises(InputError, match="gpu=a device, and this is another"), raw(path, gpu="another").opened():
        pass
    (tmp_path / "y.csv").write_text("other,columns\n1,2\n")
    with pytest.raises(InputError, match="no file of raw measurements"), raw(tmp_path / "y.csv").opened():
        pass
    assert (tmp_path / "y.csv").read_text() == "other,columns\n1,2\n"


def test_visits_become_one_row() -> None:
    rows = [{"key": "a", "time_us": time} for time in ("5", "2", "3")] + [{"key": "b", "time_us": "7"}]
    least = reduce_visits(rows, least=True)
    assert [(row["key"], row["time_us"], row["spread"]) for row in least] == [("a", "2", "1.500"), ("b", "7", "0.000")]
    assert [row["time_us"] for row in reduce_visits(rows, least=False)] == ["3", "7"]


# -- fitting ---------------------------------------------------------------------------------------------------


def synthetic(device: Accelerator) -> list[dict[str, str]]:
    """Rows that the model itself makes, of a device with the curves of an H100 and streams at two efficiencies."""
    common = {"gpu": "it", "source": "made", "library": "torch 0", "key": "", "spread": "0"}
    rows: list[dict[str, str]] = []
    for m in (256, 1024, 4096):
        for n, k in ((1024, 1024), (4096, 1024), (1024, 4096), (8192, 2048)):
            rows.append({"op": "gemm", "dtype": "bf16", "m": str(m), "n": str(n), "k": str(k), "notes": "forward"})
    for s in (512, 1024, 2048, 4096):
        for causal in ("True", "False"):
            for direction in ("fwd", "bwd"):
                shape = {"b": "2", "s": str(s), "h": "16", "h_kv": "16", "d": "128", "causal": causal}
                rows.append({"op": "attention", "dtype": "bf16", "direction": direction, **shape, "library": "FA2"})
    kernels = Kernels(device, profile=load_kernel_profile("h100-sxm"), burst=True)
    timed = []
    for row in rows:
        parsed = parse_rows([common | row | {"time_us": "1"}], accelerator="h100-sxm")
        (one,) = (*parsed.matmuls, *parsed.attentions)
        timed.append(common | row | {"time_us": str(predict(one, kernels) * 1e6)})
    for size in (1 << 22, 1 << 24, 1 << 26):
        for kind, efficiency in (("norm", 0.5), ("residual", 0.9)):
            seconds = 5e-6 + size / efficiency / device.memory_bandwidth
            row = {"op": "stream", "operator": kind, "direction": "forward", "bytes": str(size), "kernels": "1"}
            timed.append(common | row | {"time_us": str(seconds * 1e6)})
    timed.append(common | {"op": "stream", "operator": "launch", "bytes": "1", "kernels": "100", "time_us": "500"})
    best = min(float(row["time_us"]) for row in timed if row.get("m") == "4096" and row.get("n") == "8192")
    long = {"op": "sustained", "dtype": "bf16", "m": "4096", "n": "8192", "k": "2048", "notes": "long"}
    timed.append(common | long | {"time_us": str(best / 0.8)})
    empty = dict.fromkeys(COLUMNS, "")
    return [empty | row for row in timed]


def test_a_known_machine_is_found_again(tmp_path: Path) -> None:
    """From rows that the model makes: curves, streams, launch and sustained clocks; then through files and back."""
    pytest.importorskip("scipy")
    h100 = load_accelerator("h100-sxm")
    device = TorchDevice(
        torch=SimpleNamespace(__version__="0"),
        kind="cuda",
        name="H100-SXM5-80GB",
        vendor="NVIDIA",
        units=132,
        memory_bytes=80 * 2**30,
        cache_bytes=1 << 20,
    )
    rows = synthetic(h100)
    machine = fit_machine(device, rows, "it")
    assert machine.known
    assert machine.accelerator.peak_flops == h100.peak_flops
    texts = profile_texts(machine, "box", device, 1, "a test", None)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert [problem for name in texts for problem in check_profile(tmp_path / name)] == []
    kernels = Kernels(load_cluster(tmp_path / "box.yaml", 1).accelerator)
    assert kernels.profile.origin == "own"
    assert kernels.profile.stream_efficiency == {"norm forward": 0.5, "residual forward": 0.9}
    assert kernels.memory_bound(1 << 25, "norm forward") == pytest.approx(5e-6 + (1 << 25) / 0.5 / 3.35e12)
    assert kernels.memory_bound(1 << 25, "rope forward") == pytest.approx(5e-6 + (1 << 25) / 0.7 / 3.35e12)
    assert kernels.profile.launch_s == pytest.approx(5e-6)
    assert kernels.profile.sustained["bf16"] == pytest.approx(0.8, rel=1e-3)
    assert kernels.default_attention == "flash2"
    # Shapes that no row had, against the curves that made the rows.
    burst = Kernels(kernels.accelerator, burst=True)
    truth = Kernels(h100, burst=True)
    for m, n, k in ((2048, 2048, 2048), (8192, 4096, 4096), (1024, 6144, 3072)):
        assert burst.matmul(m, n, k, "bf16") == pytest.approx(truth.matmul(m, n, k, "bf16"), rel=0.05)
    for direction in ("forward", "backward"):
        shape = (4, 8, 8, 3072, 3072, 128, 128, 0.5, "flash2", direction)
        assert burst.attention(*shape) == pytest.approx(truth.attention(*shape), rel=0.05)


def test_a_device_nobody_printed_figures_of() -> None:
    """Peaks follow from the fastest kernels; predictions do not depend on the share that they are taken to reach."""
    pytest.importorskip("scipy")
    h100 = load_accelerator("h100-sxm")
    device = TorchDevice(
        torch=SimpleNamespace(__version__="0"),
        kind="cuda",
        name="a card of one's own",
        vendor="Somebody",
        units=132,
        memory_bytes=80 * 2**30,
        cache_bytes=1 << 20,
    )
    rows = synthetic(h100)
    copy = dict.fromkeys(COLUMNS, "") | {"op": "stream", "operator": "copy", "bytes": str(1 << 30), "kernels": "1"}
    rows.append(copy | {"time_us": str((1 << 30) / (0.9 * h100.memory_bandwidth) * 1e6), "source": "made"})
    machine = fit_machine(device, rows, "it")
    assert not machine.known
    assert machine.accelerator.memory_bandwidth == pytest.approx(h100.memory_bandwidth, rel=1e-3)
    assert set(machine.accelerator.peak_flops) == {"bf16"}
    profile = replace(load_kernel_profile("it", "Somebody"), matmul=machine.kernels.matmul)
    found = Kernels(machine.accelerator, profile=profile, burst=True).matmul(2048, 4096, 4096, "bf16")
    assert found == pytest.approx(Kernels(h100, burst=True).matmul(2048, 4096, 4096, "bf16"), rel=0.05)


# -- on this machine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick calibration of this processor with two ranks."""
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    output = tmp_path_factory.mktemp("machine") / "box.yaml"
    words = ["calibrate", "--device", "cpu", "--threads", "1", "--quick", "--ranks", "2", "-o", str(output)]
    assert main(words) == 0
    return output


def test_what_a_calibration_writes(measured: Path) -> None:
    folder = measured.parent
    names = {"box.yaml", "box-accelerator.yaml", "box-kernels.yaml", "box-link.yaml"}
    assert {path.name for path in folder.iterdir()} == names | {"box-measured.csv", "box-collectives.csv"}
    for name in names:
        assert check_profile(folder / name) == []
    with (folder / "box-measured.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"gemm", "attention", "stream"}
    assert len({row["key"] for row in rows}) == len(rows)
    kinds = {row["operator"] for row in rows if row["op"] == "stream"}
    assert kinds >= {"norm", "activation", "residual", "dropout", "loss", "optimizer", "embedding", "launch", "copy"}
    with (folder / "box-collectives.csv").open(newline="", encoding="utf-8") as file:
        sweeps = list(csv.DictReader(file))
    assert len(sweeps) == 6 * 4
    assert {row["n_gpus"] for row in sweeps} == {"2"}


def test_a_second_run_measures_nothing_twice(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in measured.parent.iterdir()}
    words = ["calibrate", "--device", "cpu", "--threads", "1", "--quick", "--ranks", "2", "-o", str(measured), "--json"]
    assert main(words) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["measured_now"] == 0
    assert document["failed"] == {}
    assert {path.name: path.read_bytes() for path in measured.parent.iterdir()} == before


def test_every_command_takes_what_was_written(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--global-batch-size", "2", "--seq-len", "128", "--stack", "pytorch", "--precision", "fp32", "--zero", "0"]
    assert main(["estimate", "gpt2", "--cluster", str(measured), "--gpus", "2", *plan, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["step_time_s"] > 0
    assert main(["collective", "all_reduce", "--size", "1MiB", "--cluster", str(measured), "--gpus", "2"]) == 0
    assert "host-staged" in capsys.readouterr().out


def test_a_rank_that_fails_ends_all_of_them() -> None:
    pytest.importorskip("torch")
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError, match=r"a rank failed: rank \d: KeyError"):
        measure_collectives("cpu", 2, 1, [("nonsense", 1024)], 30.0, lambda *point: None)
    assert set(multiprocessing.active_children()) <= before


def test_what_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        assert main(["calibrate", "--device", "cuda", "-o", str(tmp_path / "x.yaml")]) == 2
        assert "use --device=cpu or a machine with a GPU" in capsys.readouterr().err
    for words, message in (
        (["--device", "tpu", "-o", str(tmp_path / "x.yaml")], "unknown device 'tpu'"),
        (["--device", "cpu", "-o", str(tmp_path / "x.json")], "must end in .yaml"),
        (["--device", "cpu"], "needs --output"),
        ([], "needs a command or --device"),
        (["--device", "cpu", "kernels", "x.csv", "-o", "x"], "does not go with `kernels`"),
    ):
        assert main(["calibrate", *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'simllm\[validate,calibrate\]'"):
        open_device("cpu")
    assert list(tmp_path.iterdir()) == []
