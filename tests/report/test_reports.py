"""Reports of results: the numbers in the text are those of the results."""

from __future__ import annotations

import re

import pytest

from simllm import Model, Plan, Training, estimate, plan
from simllm.hardware import load_accelerator, load_cluster
from simllm.network import Group, price
from simllm.report import collectives, hardware, models, plans, plots, validation
from simllm.report.estimates import MEMORY, breakdown, estimate_report, memory_line
from simllm.report.text import render
from simllm.training import Estimate
from simllm.training.budget import budget
from simllm.units import format_bytes, format_duration
from simllm.validation.runs import RunResult, ValidationReport


@pytest.fixture(scope="module")
def answer() -> Estimate:
    split = Plan(tp=2, pp=4, dp=2, global_batch_size=32, sequence_parallel=True)
    return estimate(Model.load("llama-3-8b"), load_cluster("dgx-h100", 16), split, Training(seq_len=8192))


def test_breakdown_shows_every_part(answer: Estimate) -> None:
    text = render([breakdown(answer)])
    for seconds in answer.time.by_cause.values():
        assert seconds == 0 or format_duration(seconds) in text
    for size in answer.peak_stage.by_kind.values():
        assert size == 0 or format_bytes(size) in text
    assert set(MEMORY) == set(answer.peak_stage.by_kind)
    assert text.count("100%") == 2


def test_every_stage_of_a_short_pipeline(answer: Estimate) -> None:
    text = render(estimate_report(answer))
    for stage in answer.stages:
        assert re.search(rf"^ +{stage.rank} +{format_bytes(stage.peak_bytes)} ", text, re.MULTILINE)


def test_ends_and_peaks_of_a_long_pipeline() -> None:
    split = Plan(tp=8, pp=16, dp=1, global_batch_size=64, sequence_parallel=True)
    cluster = load_cluster("dgx-h100", 128)
    text = render(estimate_report(estimate(Model.load("llama-3-70b"), cluster, split, Training(seq_len=4096))))
    for rank, shown in ((0, True), (1, True), (7, False), (14, True), (15, True)):
        assert (f"\n{rank:4d}  " in text) == shown


def test_memory_line(answer: Estimate) -> None:
    assert "fits" in memory_line(answer)
    one = Plan(global_batch_size=1)
    large = estimate(Model.load("llama-3-70b"), load_cluster("dgx-h100", 1), one, Training(seq_len=4096))
    assert "DOES NOT FIT" in memory_line(large)


def test_budget(answer: Estimate) -> None:
    run = budget(answer, 10**12, usd_per_gpu_hour=2.5)
    assert run.time_s == pytest.approx(1e12 / (32 * 8192) * answer.step_time_s)
    assert run.gpu_hours == pytest.approx(run.time_s * 16 / 3600)
    assert run.usd == pytest.approx(run.gpu_hours * 2.5)
    listed = budget(answer, 10**12)
    assert listed.usd_per_gpu_hour == answer.cluster.accelerator.price_usd_per_hour
    assert listed.price_source == answer.cluster.accelerator.figures["price"].source


def test_catalog_of_hardware() -> None:
    card = load_accelerator("h100-sxm")
    document = hardware.catalog_dict([card], [], {"links": ["ici"]})
    assert document["links"] == ["ici"]
    assert document["accelerators"][0]["figures"]["memory"]["value"] == 80
    text = render(hardware.catalog_report([card], [], {"links": ["ici"]}))
    assert "989.4" in text
    assert "3.35 TB/s" in text
    assert "links  ici" in text


def test_a_figure_of_a_curve_has_the_source_of_the_curve() -> None:
    data = {
        "kind": "kernels",
        "name": "x",
        "matmul": {
            "source": "a table",
            "basis": "measured",
            "rate": {"value": 0.8, "unit": "fraction"},
            "droop": {"value": 0.1, "unit": "fraction", "source": "own", "basis": "assumed", "note": "why"},
            "residual": {"rows": 3},
        },
        "attention": {"source": "figure 5", "basis": "derived", "rate": {64: 0.5, 128: 0.7}},
        "without": {"value": 1, "unit": "us"},
    }
    shown = hardware.profile_dict(data)
    assert shown["properties"] == {}
    assert shown["figures"] == {
        "matmul.rate": {"value": 0.8, "unit": "fraction", "source": "a table", "basis": "measured", "note": None},
        "matmul.droop": {"value": 0.1, "unit": "fraction", "source": "own", "basis": "assumed", "note": "why"},
        "attention.rate.64": {"value": 0.5, "unit": "fraction", "source": "figure 5", "basis": "derived"},
        "attention.rate.128": {"value": 0.7, "unit": "fraction", "source": "figure 5", "basis": "derived"},
    }
    text = render(hardware.profile_report(data))
    assert text.count("[1]") == 2  # beside its figure and in the list of sources
    assert text.count("[3]") == 3


def test_sizes_double_up_to_the_last() -> None:
    assert collectives.doubling_sizes(8, 8) == [8]
    assert collectives.doubling_sizes(3, 20) == [3, 6, 12, 20]


def test_collective_of_one_gpu_has_nothing_to_do() -> None:
    cluster, group = load_cluster("dgx-h100", 1), Group(size=1)
    cost = price("all_reduce", 1e6, cluster, group)
    assert collectives.collective_dict(cluster, group, [cost], sweep=False)["time_s"] == 0
    assert "none" in render(collectives.collective_report(cluster, group, [cost]))


def test_side_by_side_leaves_out_what_no_model_has() -> None:
    text = render(models.comparison([Model.load("gpt2"), Model.load("llama-2-7b")], 1024))
    assert "routers" not in text
    assert "embedding tables" in text
    many = [Model.load(name) for name in ("gpt2", "gpt2-xl", "llama-2-7b", "llama-3-8b", "mistral-7b")]
    text = render(models.comparison(many, 1024))
    assert text.count("hidden size") == 2  # four abreast


def test_search(answer: Estimate) -> None:
    search = plan(
        answer.model, load_cluster("dgx-h100", 8), Training(seq_len=4096), global_batch_size=8, precision="bf16", top=3
    )
    runs = [budget(entry, 10**9) for entry in search.plans]
    document = plans.search_dict(search, runs)
    assert [entry["training_run"]["gpu_hours"] for entry in document["plans"]] == [run.gpu_hours for run in runs]
    text = render(plans.search_report(search, runs))
    for entry in search.plans:
        assert format_duration(entry.step_time_s) in text
    for reason, number in search.rejected.items():
        assert (reason in text) == (number > 0)


def test_validation_counts_reasons_without_their_numbers() -> None:
    shared = {"tier": "A", "source": "s", "framework": "f", "gpu": "g"}
    rows = [
        RunResult(id=str(n), config_key=str(n), reason=f"pp={n} is not modelled by zb-2p", **shared) for n in range(3)
    ]
    text = render(validation.validation_report(ValidationReport(rows=tuple(rows))))
    assert "3  pp=N is not modelled by zb-2p" in text
    assert "3 rows: 0 priced, 3 unsupported" in text


@pytest.mark.parametrize(("picture", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures(answer: Estimate, picture: str, start: bytes) -> None:
    assert plots.plot_estimate(answer, picture).startswith(start)


def test_picture_says_what_it_shows(answer: Estimate) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        text = plots.plot_estimate(answer, "svg").decode()
    for words in ("seconds of a step", "peak memory (GiB)", "usable", "matrix products", "llama-3-8b on 16 GPUs"):
        assert words in text
