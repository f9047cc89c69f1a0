"""The commands around collectives: what they print, which files they write, what they refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from simllm.hardware import load_cluster
from simllm.hardware.profiles import check_profile
from simllm.network import Group, price
from simllm.validation.collectives import REGIMES

TABLE = Path(__file__).parents[1] / "published" / "collectives.csv"
SCORE_KEYS = {
    "count",
    "mean_absolute_percentage_error",
    "median_absolute_percentage_error",
    "p90_absolute_percentage_error",
    "bias",
    "spearman",
}
HEADER = """\
# nThread 1 nGpus 8 minBytes 1024 maxBytes 1073741824 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
{devices}
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""


def log(ranks: int = 8, nodes: int = 1, operation: str = "all_reduce", slower: float = 1.2) -> str:
    """The output of nccl-tests on H100 nodes that are slower than the catalog says."""
    per_node = ranks // nodes
    devices = "\n".join(
        f"#  Rank {rank:2d} Group  0 Pid {900 + rank} on node{rank // per_node} device {rank % per_node:2d} [0x1a] "
        "NVIDIA H100 80GB HBM3"
        for rank in range(ranks)
    )
    cluster, group = load_cluster("dgx-h100", max(8, 8 * nodes)), Group(size=ranks)
    lines = [f"mpirun -np {ranks} ./build/{operation}_perf -b 1K -e 1G -f 2", HEADER.format(devices=devices).rstrip()]
    for size in (2**n for n in range(10, 31)):
        cost = price(operation, size, cluster, group)
        us = slower * cost.time_s * 1e6
        algbw = size / us / 1e3
        cells = f"  {us:7.2f}  {algbw:6.2f}  {algbw * cost.busbw / cost.algbw:6.2f}      0"
        lines.append(f"{size:12d}  {size // 4:12d}     float     sum      -1{cells}{cells}")
    return "\n".join([*lines, "# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 100", ""])


def table(path: Path, **cells: str) -> Path:
    row = {
        "collective": "all_reduce",
        "n_gpus": "8",
        "message_bytes": "1048576",
        "time_us": "30",
        "gpu": "H100",
    } | cells
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


def narrow(text: str) -> bool:
    lines = text.splitlines()
    return max(map(len, lines)) <= 100 and "…" not in text and "\x1b" not in text and text.endswith("\n")


# -- validate collectives ----------------------------------------------------------------------------------------------


def test_validate_collectives(cli) -> None:
    answer = cli("validate", "collectives", str(TABLE), "--json").json
    assert set(answer) == {"rows", "summary"}
    assert len(answer["rows"]) == 2904
    for row in answer["rows"]:
        assert row["status"] in ("ok", "unsupported")
        assert {"id", "reason", "measured_time_s", "predicted_time_s", "assumptions"} <= set(row)
        assert (row["predicted_time_s"] is None) == bool(row["reason"])
    assert answer["rows"][0]["id"].startswith("1/")
    summary = answer["summary"]
    assert set(summary["overall"]) >= SCORE_KEYS
    assert list(summary["regime"]) == [name for name, *_ in REGIMES]
    for group in ("regime", "system", "collective", "gpu"):
        assert all(set(score) >= SCORE_KEYS for score in summary[group].values())


def test_validate_collectives_table(cli) -> None:
    result = cli("validate", "collectives", str(TABLE))
    assert (result.status, result.err) == (0, "")
    assert narrow(result.out)
    for words in (
        "time, overall",
        "64 MB and more",
        "64 KB to 64 MB",
        "below 64 KB",
        "ABCI 2.0",
        "unsupported because",
    ):
        assert words in result.out


def test_validate_a_log_on_a_named_cluster(cli, tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    file.write_text(log(slower=1.25))
    summary = cli("validate", "collectives", str(file), "--cluster", "dgx-h100", "--json").json["summary"]
    assert summary["overall"]["count"] == 21
    assert summary["overall"]["bias"] == pytest.approx(-20, abs=0.2)  # predicted a fifth too fast
    assert list(summary["system"]) == ["dgx-h100"]


def published(path: Path, *systems: str) -> Path:
    rows = TABLE.read_text().splitlines()
    path.write_text("\n".join([rows[0], *(row for row in rows if any(system in row for system in systems))]) + "\n")
    return path


def test_cross_validation(cli, tmp_path: Path) -> None:
    file = published(tmp_path / "t.csv", "1 node HGX H100", "1 node HGX H200")
    line = f"validate collectives {file} --cross-validate 3"
    answer = cli(f"{line} --json").json
    assert set(answer["cross_validation"]) == {"sweeps", "systems"}
    for scores in answer["cross_validation"].values():
        assert scores["all"]["count"] == answer["summary"]["overall"]["count"]
        assert set(scores["all"]) >= SCORE_KEYS
        assert scores["64 MB and more"]["median_absolute_percentage_error"] < 10
    result = cli(line)
    assert result.status == 0
    assert narrow(result.out)
    assert "cross-validated by sweeps" in result.out
    assert "cross-validated by systems" in result.out
    for wrong in ("0", "1", "many", "500"):
        refused(cli(f"validate collectives {file} --cross-validate {wrong}"), f"--cross-validate={wrong}")


# -- calibrate collectives ---------------------------------------------------------------------------------------------


def test_calibrate_collectives(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.log").write_text(log())
    result = cli("calibrate collectives run.log -o links.yaml --plot residuals.png")
    assert (result.status, result.err) == (0, "")
    assert narrow(result.out)
    for words in ("nvlink4  21 points", "written to links.yaml", "switch.efficiency", "all_reduce", "worst points"):
        assert words in result.out
    assert check_profile("links.yaml") == []
    assert "fit of simllm.network.calibrate to run.log, 21 points" in Path("links.yaml").read_text()
    assert Path("residuals.png").read_bytes().startswith(b"\x89PNG")
    answer = cli("calibrate collectives run.log -o again.yaml --json").json
    (link,) = answer["links"]
    assert Path("again.yaml").read_text() == Path("links.yaml").read_text()
    assert (link["name"], link["points"], answer["written"]) == ("nvlink4", 21, {"nvlink4": "again.yaml"})
    assert link["median_absolute_percentage_error"] < 3
    assert {"before", "fitted", "unit"} == set(link["figures"]["ring.ll.launch"])
    assert len(link["sweeps"][0]["residuals"]) == 21
    assert cli("hardware check links.yaml").status == 0


def test_calibrate_several_links_into_a_folder(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.log").write_text(log() + log(16, 2))
    refused = cli("calibrate collectives run.log -o links.yaml")
    assert refused.status == 2
    assert "nvlink4, infiniband; give one of them as --link, or a folder as --output" in refused.err
    assert [file.name for file in tmp_path.iterdir()] == ["run.log"]
    Path("links").mkdir()
    result = cli("calibrate collectives run.log -o links --cluster dgx-h100 --plot r.svg")
    assert result.status == 0
    assert sorted(file.name for file in Path("links").iterdir()) == ["infiniband.yaml", "nvlink4.yaml"]
    assert "infiniband" in result.out
    assert narrow(result.out)
    assert cli("calibrate collectives run.log -o ib.yaml --link infiniband").status == 0
    assert "name: infiniband" in Path("ib.yaml").read_text()


def test_calibrate_from_a_published_table(cli, tmp_path: Path) -> None:
    file = published(tmp_path / "h100.csv", "1 node HGX H100")
    answer = cli("calibrate", "collectives", str(file), "-o", str(tmp_path / "x.yaml"), "--json").json
    (link,) = answer["links"]
    assert link["name"] == "nvlink4"
    assert link["points"] == 189
    assert link["median_absolute_percentage_error"] < 6
    assert sum(answer["left_out"].values()) == 46  # other libraries' kernels


# -- collective --sweep ------------------------------------------------------------------------------------------------

SWEEP = "collective all_reduce --size 16GiB --min-size 16MiB --cluster dgx-h100 --gpus 64 --sweep"


def test_sweep_says_how_much_of_the_wire_is_used(cli) -> None:
    answer = cli(f"{SWEEP} --json").json
    for entry in answer["sweep"]:
        assert 0 < entry["efficiency"] < 1
        assert entry["busbw_bytes_per_s"] == pytest.approx(entry["efficiency"] * entry["wire_limit_busbw_bytes_per_s"])
    assert answer["efficiency"] == answer["sweep"][-1]["efficiency"] > 0.85
    result = cli(SWEEP)
    assert narrow(result.out)
    assert "of wire" in result.out
    assert "of the wire limit, a busbw of" in cli("collective all_gather --size 1GB --cluster dgx-h100 --gpus 8").out


@pytest.mark.parametrize(
    "operation", ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv"]
)
@pytest.mark.parametrize(
    ("cluster", "gpus"), [("dgx-h100", 8), ("gb200-nvl72", 144), ("mi300x-platform", 8), ("tpu-v5p-pod", 64)]
)
def test_nothing_beats_the_wire(cli, operation: str, cluster: str, gpus: int) -> None:
    line = f"collective {operation} --size 64GiB --cluster {cluster} --gpus {gpus} --sweep --json"
    assert all(0 < entry["efficiency"] <= 1 for entry in cli(line).json["sweep"])


def test_measured_beside_predicted(cli, tmp_path: Path) -> None:
    picture = tmp_path / "busbw.svg"
    answer = cli(f"{SWEEP} --measured {TABLE} --plot {picture} --json").json
    (series,) = answer["measured"]
    assert series["system"] == "8 nodes DGX H100 (8xNDR400)"
    assert len(series["points"]) == 10
    assert "<svg" in picture.read_text()
    result = cli(f"{SWEEP} --measured {TABLE}")
    assert narrow(result.out)
    for words in ("measured", "error", "- 8 nodes DGX H100 (8xNDR400), 10 points"):
        assert words in result.out
    other = cli(SWEEP.replace("--gpus 64", "--gpus 24") + f" --measured {TABLE}")
    assert "Nothing in the file was measured on such a group." in other.out


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(result, *said: str) -> None:
    assert (result.status, result.out) == (2, ""), result
    assert "Traceback" not in result.err
    assert result.err.startswith("simllm: ")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


EMPTY_TABLE = log().split("        1024")[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["is empty"]),
        (" \n\n", ["is empty"]),
        ("Segmentation fault\n", ["no table of nccl-tests"]),
        (EMPTY_TABLE, ["no row with a size above zero"]),
        (log().replace("        1024 ", "       -1024 ", 1), ["size=-1024 must be above zero"]),
        ("a,b\n1,2\n", ["lacks the columns collective, n_gpus, message_bytes, time_us"]),
        ("collective,n_gpus,message_bytes,time_us\n", ["a header but no rows"]),
        (b"\xff\xfe\x00", ["not text in UTF-8"]),
    ],
)
@pytest.mark.parametrize(
    "command", ["validate collectives in.txt", "calibrate collectives in.txt -o out.yaml --plot p.png"]
)
def test_file_that_cannot_be_used(
    cli, command: str, content: str | bytes, said: list[str], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(cli(command), "in.txt", *said)
    assert [file.name for file in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize(
    ("cells", "options", "said"),
    [
        ({"message_bytes": "0"}, "", ["line 2", "message_bytes=0", "above zero"]),
        ({"message_bytes": "-8"}, "", ["line 2", "message_bytes=-8", "above zero"]),
        ({"time_us": "fast"}, "", ["line 2", "time_us='fast'", "not a number"]),
        ({"collective": "all_redcue"}, "", ["all_redcue", "all_reduce"]),
        ({"gpu": "abacus"}, "", ["'abacus'", "catalog"]),
        ({"n_gpus": "12", "n_nodes": "2"}, "--cluster tinybox-green", ["num_gpus=12", "at most 6"]),
        ({"n_gpus": "64", "n_nodes": "1"}, "--cluster dgx-h100", ["n_gpus=64", "8 GPUs"]),
        ({}, "--cluster dgx-h10", ["dgx-h100"]),
        ({}, "--cluster missing.yaml", ["missing.yaml", "does not exist"]),
        ({}, "--collective all_redcue", ["'all_redcue'", "all_reduce"]),
        ({}, "--gpus 0", ["--gpus=0"]),
        ({}, "--link nvlink5", ["--link=nvlink5", "nvlink4"]),
        ({}, "", ["1 point over nvlink4", "sweep over sizes"]),
    ],
)
def test_calibration_that_cannot_be(cli, cells: dict, options: str, said: list[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    table(Path("t.csv"), **cells)
    refused(cli(f"calibrate collectives t.csv -o out.yaml {options}".strip()), *said)
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("place", ["missing/out.yaml", "file/out.yaml", "x" * 300])
def test_profile_that_cannot_be_written(cli, place: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.log").write_text(log())
    Path("file").write_text("kept")
    refused(cli("calibrate", "collectives", "run.log", "-o", place), f"--output={place}")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "run.log"]


def test_full_disk_leaves_no_part_of_a_profile(cli, tmp_path: Path, monkeypatch) -> None:
    import os

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    Path("run.log").write_text(log())
    monkeypatch.setattr(os, "replace", full)
    refused(cli("calibrate collectives run.log -o out.yaml"), "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["run.log"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("calibrate", ["collectives"]),
        ("calibrate collectives run.log", ["--output"]),
        ("calibrate collectives gone.log -o x.yaml", ["gone.log does not exist"]),
        ("calibrate collectives . -o x.yaml", [". is not a file"]),
        ("calibrate collectives run.log -o x.yaml --plot p.gif", ["--plot=p.gif", ".png"]),
        ("validate collectives gone.csv", ["gone.csv does not exist"]),
        (SWEEP.replace(" --sweep", "") + " --measured run.log", ["--sweep"]),
        (SWEEP + " --measured gone.csv", ["gone.csv does not exist"]),
        (SWEEP + " --ranks 1 --plot p.png", ["one rank alone exchanges nothing"]),
        (SWEEP + " --plot missing/p.png", ["--plot=missing/p.png", "no folder"]),
    ],
)
def test_refused(cli, line: str, said: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.log").write_text(log())
    refused(cli(line), *said)
    assert [file.name for file in tmp_path.iterdir()] == ["run.log"]


def test_validation_never_stops_at_a_row(cli, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", message_bytes="-3", gpu="", n_gpus="nan", time_us="inf")
    answer = cli("validate", "collectives", str(file), "--json").json
    assert [row["status"] for row in answer["rows"]] == ["unsupported"]
    assert answer["summary"]["overall"]["count"] == 0
    assert json.dumps(answer)
    assert "0 priced, 1 unsupported" in cli("validate", "collectives", str(file)).out
