"""One page about a plan or a search: what was asked, the answer, pictures, formulas, assumptions and sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType

from simllm.hardware.figures import Figure
from simllm.hardware.profiles import figures_of
from simllm.planner import PlanSearch
from simllm.planner.binding import resources
from simllm.planner.reasons import CAUSES, difference
from simllm.planner.sensitivity import Change
from simllm.report.estimates import estimate_report
from simllm.report.formulas import formulas_table
from simllm.report.page import Picture, html_page
from simllm.report.plan_plots import plot_pareto, plot_plans, plot_sensitivity
from simllm.report.plans import search_report
from simllm.report.plots import plot_estimate
from simllm.report.runs import run_report
from simllm.report.sensitivities import sensitivity_report
from simllm.report.text import heading, paragraph, table
from simllm.report.timeline_plot import plot_timeline
from simllm.training import Estimate
from simllm.training.budget import Budget
from simllm.training.timeline import step_timeline
from simllm.units import format_duration

__all__ = ["estimate_page", "search_page"]

Parts = list[RenderableType | Picture]


def estimate_page(
    answer: Estimate, run: Budget | None = None, changes: Sequence[Change] = (), command: str | None = None
) -> bytes:
    """A self-contained HTML page about one plan.

    Parameters
    ----------
    answer : Estimate
    run : Budget, optional
        The whole run, where tokens were given.
    changes : sequence of Change
        What would help, where it was asked.
    command : str, optional
        The command that made the page, for the footer.
    """
    parts: Parts = [*estimate_report(answer, run), *_pictures(answer), *_details(answer, run, changes)]
    return html_page(f"simllm: {answer.model.name}, {answer.plan}", parts, _footer(command))


def search_page(
    search: PlanSearch,
    runs: Sequence[Budget] = (),
    changes: Sequence[Change] = (),
    command: str | None = None,
) -> bytes:
    """A self-contained HTML page about a search; parameters as in `estimate_page`.

    When nothing fits, the page says what comes nearest.
    """
    if not search.plans:
        parts: Parts = [*search_report(search)]
        if search.nearest is not None:
            parts += [*_pictures(search.nearest), *_details(search.nearest, None, ())]
        return html_page("simllm: no plan fits", parts, _footer(command))
    best = search.plans[0]
    parts = [*search_report(search, runs)]
    if len(search.plans) > 1:
        caption = "The plans beside each other: seconds of a step by cause, memory of the fullest GPU by kind"
        parts += [heading("The plans beside each other"), Picture(svg=plot_plans(search.plans, "svg"), caption=caption)]
        parts += [_differences(search), heading("Worth a choice")]
        caption = "Time against memory: on the line no other plan shown is better in both"
        sizes = len({answer.plan.num_gpus for answer in search.plans}) > 1
        if sizes:
            caption = "GPU-hours against time: on the line no other plan shown is better in both"
        axes = ("gpu-time", "time") if sizes else ("memory", "time")
        parts.append(Picture(svg=plot_pareto(search.plans, "svg", axes), caption=caption))
    parts += [*_pictures(best), *_details(best, runs[0] if runs else None, changes)]
    return html_page(f"simllm: the best plan for {best.model.name}", parts, _footer(command))


def _footer(command: str | None) -> str:
    from simllm import __version__

    made = f"simllm {__version__}"
    return f"{made}: {command}" if command else made


def _pictures(answer: Estimate) -> Parts:
    parts: Parts = [
        heading("Time and memory of the plan"),
        Picture(
            svg=plot_estimate(answer, "svg"),
            caption="Seconds of a step by cause, and memory of each pipeline rank by kind against what is usable",
        ),
    ]
    if answer.plan.pp > 1:
        line = step_timeline(answer)
        caption = (
            "Every action of every pipeline rank, with the number of its micro-batch; paler boxes are later model "
            "chunks, white gaps are bubble"
        )
        parts += [heading("The pipeline of one step", answer.plan.schedule)]
        parts.append(Picture(svg=plot_timeline(answer, line, "svg"), caption=caption))
    return parts


def _details(answer: Estimate, run: Budget | None, changes: Sequence[Change]) -> Parts:
    total = answer.step_time_s
    rows = [(name, format_duration(s), f"{s / total:.1%}") for name, s in resources(answer).items()]
    parts: Parts = [heading("What binds"), table(("resource", "", "share"), rows, left=("resource",))]
    parts += [heading("How each part comes about"), formulas_table(answer)]
    if run is not None:
        parts += run_report(run)
    if changes:
        parts += sensitivity_report(changes)
        if any(change.same_plan is not None for change in changes):
            caption = "Throughput with more of one thing at a time"
            parts.append(Picture(svg=plot_sensitivity(changes, "svg"), caption=caption))
    return [
        *parts,
        heading("Sources", "figures of the profiles this answer rests on"),
        _sources(answer),
        _curves(answer),
    ]


def _differences(search: PlanSearch) -> RenderableType:
    """Seconds that every other plan needs more or less than the first, by cause (GPU time where the GPUs differ)."""
    best, *others = search.plans
    changes = [difference(best, other) for other in others]
    causes = [cause for cause in CAUSES if any(abs(change[cause]) > 5e-4 * best.step_time_s for change in changes)]
    columns = ("against the first", "step", *(CAUSES[cause] for cause in causes))
    rows = [
        (str(number), _signed(sum(change.values())), *(_signed(change[cause]) for cause in causes))
        for number, change in enumerate(changes, start=2)
    ]
    return table(columns, rows)


def _signed(seconds: float) -> str:
    return "0" if seconds == 0 else f"{'+' if seconds > 0 else '-'}{format_duration(abs(seconds))}"


def _curves(answer: Estimate) -> RenderableType:
    """Where the fitted curves are, which would fill pages."""
    cluster = answer.cluster
    links = [link for link in (cluster.scaleup_link, cluster.scaleout_link) if link]
    commands = [f"simllm hardware show {cluster.accelerator.name} --kind kernels"]
    commands += [f"simllm hardware show {link}" for link in links]
    return paragraph(f"The fitted curves of kernels and links, each with its source: {', '.join(commands)}.")


def _sources(answer: Estimate) -> RenderableType:
    cluster, card, stack = answer.cluster, answer.cluster.accelerator, answer.training.software
    found: list[tuple[str, Mapping[str, Figure]]] = [
        (card.name, card.figures),
        (cluster.name, cluster.figures),
        (stack.name, figures_of(stack)),
    ]
    rows = [
        (profile, key.replace("_", " "), f"{figure.value:g} {figure.unit}", figure.basis, figure.source)
        for profile, figures in found
        for key, figure in figures.items()
    ]
    columns = ("profile", "figure", "value", "basis", "source")
    return table(columns, rows, left=("profile", "figure", "basis", "source"), wrap=("figure", "source"))
