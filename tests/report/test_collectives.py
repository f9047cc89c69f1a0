"""Reports and pictures of collectives: the wire limit against hand calculation, and what a picture says."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from simllm.hardware import load_cluster
from simllm.network import Group, price, sweep
from simllm.report.collective_plots import plot_collectives, plot_residuals
from simllm.report.collectives import (
    calibration_dict,
    calibration_report,
    collective_dict,
    collective_report,
    wire_times_s,
)
from simllm.report.text import render
from simllm.report.validation import collective_validation_report
from simllm.validation.collective_rows import Series
from simllm.validation.collectives import CollectiveReport, CollectiveResult
from simllm.validation.link_fit import LinkFit, Measured, fit_links, measured_sweeps
from simllm.validation.table import Row


@pytest.mark.parametrize(
    ("operation", "cluster", "gpus", "algorithm", "busbw"),
    [
        ("all_reduce", "dgx-h100", 8, "ring", 450e9),
        # The switch adds: 9/8 of the buffer instead of 14/8 over 450 GB/s.
        ("all_reduce", "dgx-h100", 8, "nvls", 450e9 * 14 / 9),
        ("all_gather", "dgx-h100", 64, "ring", 400e9),  # eight NICs of 50 GB/s for one ring each
        ("reduce_scatter", "dgx-a100", 8, "ring", 300e9),
        ("all_gather", "mi300x-platform", 8, "ring", 448e9),
        ("send_recv", "dgx-h100", 8, None, 450e9),
        ("all_to_all", "dgx-h100", 8, None, 450e9),
        ("all_to_all", "dgx-h100", 2, None, 450e9),  # its channels are slower, but no limit of the wire
        # Two nodes: half of what a GPU sends leaves over its NIC, of which busbw counts 15/16.
        ("all_to_all", "dgx-h100", 16, None, 50e9 * 2 * 15 / 16),
    ],
)
def test_wire_limit(operation: str, cluster: str, gpus: int, algorithm: str | None, busbw: float) -> None:
    where, group = load_cluster(cluster, gpus), Group(size=gpus)
    costs = [price(operation, size, where, group, algorithm) for size in (1e6, 1e9)]
    for cost, wire_s in zip(costs, wire_times_s(where, group, costs), strict=True):
        assert cost.size_bytes / wire_s * cost.busbw / cost.algbw == pytest.approx(busbw)
        assert wire_s < cost.time_s


def test_one_rank_has_no_wire() -> None:
    where, group = load_cluster("dgx-h100", 1), Group(size=1)
    costs = sweep("all_reduce", [1e6, 1e9], where, group)
    assert wire_times_s(where, group, costs) == [0.0, 0.0]
    assert collective_dict(where, group, costs, sweep=True)["efficiency"] is None
    assert "none" in render(collective_report(where, group, costs))


def text_of(picture: bytes) -> str:
    return picture.decode()


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters of an SVG stay letters."""
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")


def test_sweep_picture_says_what_it_shows(readable: None) -> None:
    where, group = load_cluster("dgx-h100", 8), Group(size=8)
    costs = sweep("all_reduce", [2**n for n in range(10, 34)], where, group)
    series = Series(label="a <box> of eight", sweep="1", sizes_bytes=(2.0**20, 2.0**30), times_s=(28e-6, 4.1e-3))
    text = text_of(plot_collectives(where, group, costs, "svg", [series]))
    for words in (
        "all_reduce, 8 ranks of dgx-h100 (1 node)",
        "bus bandwidth (GB/s)",
        "time (us)",
        "predicted, ring",
        "predicted, nvls",
        "wire limit of the algorithm",
        "measured, a &lt;box&gt; of eight",
        "1 GiB",
    ):
        assert words in text


@pytest.fixture(scope="module")
def calibrated() -> tuple[list[LinkFit], Measured]:
    """Eight H100 that take a tenth longer than the catalog says."""
    where, group = load_cluster("dgx-h100", 8), Group(size=8)
    rows = []
    for number, size in enumerate((2**n for n in range(10, 31)), 2):
        seconds = 1.1 * price("all_gather", size, where, group).time_s
        cells = {"collective": "all_gather", "system": "dgx-h100", "n_gpus": "8", "n_nodes": "1"}
        rows.append(Row(line=number, cells=cells | {"message_bytes": str(size), "time_us": str(seconds * 1e6)}))
    rows.append(Row(line=99, cells={"collective": "gather", "n_gpus": "8", "message_bytes": "8", "time_us": "9"}))
    measured = measured_sweeps(rows)
    return fit_links(measured.sweeps, "x.csv"), measured


def test_calibration_report(calibrated: tuple[list[LinkFit], Measured]) -> None:
    fits, measured = calibrated
    text = render(calibration_report(fits, measured, {"nvlink4": "out.yaml"}))
    for words in (
        "nvlink4  21 points, median error",
        "written to out.yaml",
        "ring.step",
        "all_gather",
        "9.1%",
        "=gather",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100
    data = calibration_dict(fits, measured)
    (link,) = data["links"]
    assert link["median_absolute_percentage_error"] < 1
    assert [point["size_bytes"] for point in link["sweeps"][0]["residuals"]] == [2**n for n in range(10, 31)]
    assert sum(data["left_out"].values()) == 1


def test_residual_picture_says_what_it_shows(readable: None, calibrated: tuple[list[LinkFit], Measured]) -> None:
    text = text_of(plot_residuals(calibrated[0], "svg"))
    for words in (
        "Measured against fitted: nvlink4",
        "bus bandwidth (GB/s)",
        "all_gather, 8 ranks, dgx-h100",
        "fitted",
    ):
        assert words in text


def test_residual_picture_of_many_sweeps_says_how_many(
    readable: None, calibrated: tuple[list[LinkFit], Measured]
) -> None:
    (fit,) = calibrated[0]
    many = LinkFit(before=fit.before, link=fit.link, paths=fit.paths, sweeps=fit.sweeps * 20)
    assert "the 12 longest of 20 sweeps" in text_of(plot_residuals([many], "svg"))


def test_validation_report_without_anything_priced() -> None:
    row = CollectiveResult(id="1", sweep="", system="", gpu="", collective="gather", reason="n_gpus=7 is too many")
    text = render(collective_validation_report(CollectiveReport(rows=(row,))))
    assert "1 rows: 0 priced, 1 unsupported" in text
    assert "1  n_gpus=N is too many" in text
