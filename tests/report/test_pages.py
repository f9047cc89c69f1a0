"""Pages, traces and pictures: they hold the numbers of the answer, need nothing from outside, and open in a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from simllm import Cluster, Model, Plan, Training, estimate, plan
from simllm.errors import InputError
from simllm.planner import PlanSearch
from simllm.planner.reasons import CAUSES
from simllm.planner.sensitivity import sensitivity
from simllm.report.estimates import MEMORY
from simllm.report.formulas import formulas_table
from simllm.report.html import estimate_page, search_page
from simllm.report.page import Picture, html_page
from simllm.report.plan_plots import plot_pareto, plot_plans, plot_scaling, plot_sensitivity
from simllm.report.plots import plot_estimate
from simllm.report.runs import run_report
from simllm.report.sensitivities import sensitivity_report
from simllm.report.text import heading, render, table
from simllm.report.timeline_plot import plot_timeline
from simllm.report.trace import trace_dict, trace_json
from simllm.training import Estimate
from simllm.training.budget import budget
from simllm.training.operation import Operation
from simllm.training.timeline import step_timeline
from simllm.units import format_duration

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def answer() -> Estimate:
    split = Plan(tp=2, pp=4, vpp=2, dp=2, global_batch_size=32, sequence_parallel=True, schedule="interleaved")
    return estimate(Model.load("llama-3-8b"), Cluster.load("dgx-h100", 16), split, Training(seq_len=8192))


@pytest.fixture(scope="module")
def search() -> PlanSearch:
    cluster = Cluster.load("dgx-h100", 8)
    return plan(Model.load("llama-3-8b"), cluster, Training(seq_len=8192), global_batch_size=16, top=4)


class Reader(HTMLParser):
    """What a page refers to, and its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: bytes) -> Reader:
    reader = Reader()
    reader.feed(page.decode())
    return reader


def test_page_of_an_estimate(answer: Estimate) -> None:
    run = budget(answer, 10**12, operation=Operation(pue=1.2, kg_co2e_per_kwh=0.3))
    reader = read(estimate_page(answer, run, sensitivity(answer), "simllm estimate <model>"))
    words = " ".join(reader.text)
    assert reader.references  # pictures
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in reader.references)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    for seconds in answer.time.by_cause.values():
        assert seconds == 0 or format_duration(seconds) in words
    for text in (
        "What binds",
        "The pipeline of one step",
        "The whole run",
        "What would help",
        "Assumptions",
        "Sources",
    ):
        assert text in words
    assert f"{run.with_failures.goodput:.1%}" in words
    assert answer.cluster.accelerator.figures["memory"].source in words
    assert "simllm estimate <model>" in words
    assert reader.tags.count("h1") == 1


def test_page_of_a_search(search: PlanSearch) -> None:
    reader = read(search_page(search))
    words = " ".join(reader.text)
    assert all(reason in words for reason in search.why)
    assert "The plans beside each other" in words
    assert all(reference.startswith("data:") for reference in reader.references)


def test_page_when_nothing_fits() -> None:
    cluster = Cluster.load("dgx-h100", 8)
    search = plan(Model.load("llama-3-70b"), cluster, Training(seq_len=8192), global_batch_size=8)
    words = " ".join(read(search_page(search)).text)
    assert "No plan fits." in words
    assert "nearest to fitting" in words


def test_markup_of_what_people_write() -> None:
    parts = [heading("<b>", "& more"), table(("a<", "b"), [("<script>", "1 & 2")], left=("a<",), bold=0)]
    page = html_page("<title>", [*parts, Picture(svg=b"<svg/>", caption='"quoted"')], "<footer>").decode()
    assert "<h1>&lt;b&gt;<small>&amp; more</small></h1>" in page
    assert '<tr class="stress"><td class="left whole">&lt;script&gt;</td><td class="whole">1 &amp; 2</td></tr>' in page
    assert "<title>&lt;title&gt;</title>" in page
    assert 'alt="&quot;quoted&quot;" src="data:image/svg+xml;base64,PHN2Zy8+"' in page


def test_every_part_has_a_formula(answer: Estimate) -> None:
    rows = formulas_table(answer).row_count
    parts = [s for s in answer.time.by_cause.values() if s > 0] + [b for b in answer.peak_stage.by_kind.values() if b]
    assert rows == len(parts)
    from simllm.report import formulas

    assert set(formulas._TIME) == set(CAUSES)
    assert set(formulas._MEMORY) == set(MEMORY)


def test_reports_of_runs_and_changes(answer: Estimate) -> None:
    run = budget(answer, 10**12, operation=Operation(pue=1.2, kg_co2e_per_kwh=0.3))
    text = render(run_report(run))
    for word in ("goodput", "GPU-hours", "USD", "CO2e", "checkpoints", "2026-03", "PUE 1.2", "419 unexpected"):
        assert word in text
    assert f"{run.ideal.time_s / 86400:,.1f}" in text
    assert "give --price" not in text
    changes = sensitivity(answer)
    text = render(sensitivity_report(changes))
    for change in changes:
        assert change.after in text
        assert change.same_plan is None or f"{change.gain(change.same_plan):+.1%}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_trace(answer: Estimate) -> None:
    line = step_timeline(answer)
    trace = json.loads(trace_json(answer, line))
    assert trace == json.loads(json.dumps(trace_dict(answer, line)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    # Forward and backward of every chunk and micro-batch; gradients, clipping and optimizer once a rank.
    assert len(events) == 4 * (2 * 2 * 16 + 3)
    assert max(event["ts"] + event["dur"] for event in events) == round(line.total_s * 1e6)
    for rank in range(4):
        own = [event for event in events if event["tid"] == rank]
        # Viewers drop slices that overlap by whatever little.
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(own))
    assert {event["tid"] for event in events} == {0, 1, 2, 3}
    forward = [event for event in events if event["cat"] == "forward" and event["tid"] == 1]
    for event in forward:
        parts = [value for name, value in event["args"].items() if name.endswith("_us")]
        assert sum(parts) == pytest.approx(event["dur"], abs=1)
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert names == {f"pipeline rank {rank}" for rank in range(4)}
    assert trace["otherData"]["step_time_s"] == answer.step_time_s


def test_pictures(answer: Estimate, search: PlanSearch, tmp_path: Path) -> None:
    from matplotlib.image import imread

    other = plan(answer.model, answer.cluster, answer.training, global_batch_size=16, top=2).plans
    many = Plan(pp=2, dp=1, global_batch_size=128)
    long = estimate(Model.load("gpt2"), Cluster.load("dgx-h100", 2), many, Training(seq_len=1024))
    pictures = {
        "plans": plot_plans(search.plans, "png"),
        "scaling": plot_scaling([search.plans[0], other[0]], "png"),
        "pareto": plot_pareto([*search.plans, *other], "png"),
        "sensitivity": plot_sensitivity(sensitivity(answer), "png"),
        "timeline": plot_timeline(answer, step_timeline(answer), "png"),
        "long timeline": plot_timeline(long, step_timeline(long), "png"),
        "one rank": plot_estimate(search.plans[0], "png"),
    }
    for name, data in pictures.items():
        file = tmp_path / f"{name}.png"
        file.write_bytes(data)
        pixels = imread(file)[..., :3]
        drawn = (pixels.max(axis=2) - pixels.min(axis=2) > 0.2).mean()
        assert drawn > 0.004, name  # coloured, not only axes


def test_pictures_of_nothing_are_refused(answer: Estimate) -> None:
    with pytest.raises(InputError, match="two points"):
        plot_scaling([answer], "png")
    with pytest.raises(InputError, match="no plan fits"):
        plot_pareto([], "png")
    with pytest.raises(InputError, match="nothing to draw"):
        plot_sensitivity([], "png")


def test_page_in_a_browser(answer: Estimate, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(BROWSERS)} is installed")
    from matplotlib.image import imread

    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_bytes(estimate_page(answer, budget(answer, 10**12), sensitivity(answer)))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    flags += " --disable-background-networking --disable-component-update --disable-sync --window-size=1250,5200"
    command = [
        browser,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={shot}",
        file.as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, timeout=120, check=False, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert shot.is_file(), done.stderr.decode(errors="replace")[-2000:]
    pixels = (imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (5200, 1250)

    def count(red: int, green: int, blue: int) -> int:
        return int((abs(pixels - (red, green, blue)).max(axis=2) <= 2).sum())

    # Bars of a picture, forward and backward of the timeline, and the bars of the table: all are really drawn.
    for name, colour in {"bars": (31, 119, 180), "forward": (76, 120, 168), "backward": (242, 163, 94)}.items():
        assert count(*colour) > 2000, name
    rows = (pixels.min(axis=2) < 128).any(axis=1)
    assert rows[:4000].mean() > 0.3  # text and pictures down the page
