"""Pictures of plans beside each other: where their time and memory go, scaling, Pareto fronts, what would help.

Pictures come back as bytes in the format asked for; matplotlib is loaded in the functions and needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from simllm.errors import InputError
from simllm.planner.pareto import PARETO_OBJECTIVES, objective_value, pareto_front
from simllm.planner.reasons import CAUSES
from simllm.planner.sensitivity import Change
from simllm.report.estimates import MEMORY
from simllm.training import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_pareto", "plot_plans", "plot_scaling", "plot_sensitivity"]


def _label(answer: Estimate) -> str:
    plan = answer.plan
    degrees = (("tp", plan.tp), ("pp", plan.pp), ("vpp", plan.vpp), ("cp", plan.cp), ("ep", plan.ep), ("dp", plan.dp))
    shown = [f"{name}{degree}" for name, degree in degrees if degree > 1 or name in ("tp", "pp", "dp")]
    zero = "hsdp" if plan.zero == "hsdp" else f"zero{plan.zero}"
    again = "" if str(plan.recompute) == "none" else f", recompute {plan.recompute}"
    return f"{' '.join(shown)}\n{zero} mbs{plan.micro_batch_size}{again}"


def plot_plans(answers: Sequence[Estimate], picture: str) -> bytes:
    """Time by cause and memory by kind of several plans, a bar each, the first on top.

    Parameters
    ----------
    answers : sequence of Estimate
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    figure = _figure(13, 2.4 + 0.55 * len(answers))
    left, right = figure.subplots(1, 2)
    labels = [f"{number}. {_label(answer)}" for number, answer in enumerate(answers, start=1)]
    _stack(left, [a.time.by_cause for a in answers], CAUSES, 1.0)
    _stack(right, [dict(a.peak_stage.by_kind) for a in answers], MEMORY, 2**30)
    left.set_yticks(range(len(answers)), labels, fontsize="small")
    right.set_yticks(range(len(answers)), [str(number) for number in range(1, len(answers) + 1)])
    left.set_xlabel("seconds of a step")
    right.set_xlabel("GiB on the fullest GPU")
    for usable in sorted({answer.usable_memory_bytes / 2**30 for answer in answers}):
        right.axvline(usable, color="black", linestyle="--", linewidth=1)
        right.annotate(
            "usable", (usable, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
        )
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(0, -0.22))
    first = answers[0]
    figure.suptitle(f"{first.model.name} on {first.cluster.name}: where time and memory of the plans go")
    return _bytes(figure, picture)


def _stack(axes: Axes, parts: Sequence[dict[str, float]], words: dict[str, str], scale: float) -> None:
    from matplotlib import colormaps

    # A cause or a kind has the same colour in every picture: dark tones first, then the light ones.
    tones = colormaps["tab20"].colors  # type: ignore[attr-defined]
    floor = [0.0] * len(parts)
    places = list(range(len(parts)))
    for (name, word), colour in zip(words.items(), (*tones[::2], *tones[1::2]), strict=False):
        values = [part.get(name, 0.0) / scale for part in parts]
        if any(value > 0 for value in values):
            axes.barh(places, values, left=floor, label=word, color=colour, height=0.7)
            floor = [a + b for a, b in zip(floor, values, strict=True)]


def plot_scaling(answers: Sequence[Estimate], picture: str, tokens: float = 1e12) -> bytes:
    """Days and utilisation over the number of GPUs, perfect scaling of the first point as a line.

    Parameters
    ----------
    answers : sequence of Estimate
        One for each number of GPUs.
    picture : str
        ``png``, ``svg`` or ``pdf``.
    tokens : float
        Length of the run.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from simllm.units import format_count

    if len(answers) < 2:
        raise InputError(f"a scaling curve needs two points at least, not {len(answers)}")
    ordered = sorted(answers, key=lambda answer: answer.plan.num_gpus)
    gpus = [answer.plan.num_gpus for answer in ordered]
    days = [answer.training_time_s(tokens) / 86400 for answer in ordered]
    figure = _figure(12, 4.6)
    left, right = figure.subplots(1, 2)
    left.plot(gpus, days, marker="o", label="best plan")
    left.plot(gpus, [days[0] * gpus[0] / n for n in gpus], ":", color="0.4", label="perfect scaling")
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    left.set_ylabel(f"days for {format_count(tokens)} tokens")
    right.plot(gpus, [100 * answer.mfu for answer in ordered], marker="o")
    right.set_ylabel("MFU (%)")
    right.set_ylim(0, 115 * max(answer.mfu for answer in ordered))
    for answer in ordered:
        plan = answer.plan
        text = f"tp{plan.tp} pp{plan.pp}" + (f" cp{plan.cp}" if plan.cp > 1 else "")
        right.annotate(text, (plan.num_gpus, 100 * answer.mfu), xytext=(0, -14), textcoords="offset points",
                       ha="center", fontsize=8)  # fmt: skip
    for axes in (left, right):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(gpus))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("GPUs")
        axes.grid(visible=True, alpha=0.3)
        axes.margins(x=0.12)
    left.legend(frameon=False)
    figure.suptitle(f"{ordered[0].model.name} on {ordered[0].cluster.name}: scaling of the best plans")
    return _bytes(figure, picture)


def plot_pareto(answers: Sequence[Estimate], picture: str, objectives: tuple[str, str] = ("gpu-time", "time")) -> bytes:
    """Plans in two objectives, both better towards the corner; those that no other one beats are joined.

    Parameters
    ----------
    answers : sequence of Estimate
    picture : str
        ``png``, ``svg`` or ``pdf``.
    objectives : (str, str)
        Names in `simllm.planner.pareto.PARETO_OBJECTIVES`: across and up.
    """
    fitting = [answer for answer in answers if answer.fits]
    if not fitting:
        raise InputError("no plan fits: there is nothing to compare")
    front = pareto_front(fitting, objectives)
    figure = _figure(8.5, 5.2)
    axes = figure.subplots()
    x, y = ([objective_value(answer, name) for answer in fitting] for name in objectives)
    free = [100 * (1 - objective_value(answer, "memory")) for answer in fitting]
    points = axes.scatter(x, y, c=free, cmap="viridis", s=50, zorder=2)
    figure.colorbar(points, ax=axes, label="memory left free (%)")
    corner = [[objective_value(answer, name) for answer in front] for name in objectives]
    axes.plot(*corner, color="C3", linewidth=1, zorder=1, label="no plan is better in both")
    offsets = ((8, 5), (8, -12))
    for number, answer in enumerate(front):
        text = f"{answer.plan.num_gpus} GPUs: {_label(answer).splitlines()[0]}"
        axes.annotate(text, (corner[0][number], corner[1][number]), xytext=offsets[number % 2],
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel(PARETO_OBJECTIVES[objectives[0]][1])
    axes.set_ylabel(PARETO_OBJECTIVES[objectives[1]][1])
    axes.margins(x=0.15, y=0.12)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"{fitting[0].model.name}: {len(front)} of {len(fitting)} plans are worth a choice")
    return _bytes(figure, picture)


def plot_sensitivity(changes: Sequence[Change], picture: str) -> bytes:
    """Gain in throughput of every change, the largest on top: with the same plan, and with the best where known.

    Parameters
    ----------
    changes : sequence of Change
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    known = [change for change in changes if change.same_plan is not None]
    if not known:
        raise InputError("the plan cannot run on any changed question: there is nothing to draw")
    ordered = sorted(known, key=lambda change: change.gain(change.same_plan or change.base))
    figure = _figure(9, 1.6 + 0.55 * len(ordered))
    axes = figure.subplots()
    searched = any(change.best is not None for change in ordered)
    height = 0.38 if searched else 0.7
    rows = list(range(len(ordered)))
    same = [100 * change.gain(change.same_plan or change.base) for change in ordered]
    fits = [change.same_plan is not None and change.same_plan.fits for change in ordered]
    shift = height / 2 if searched else 0.0
    bars = axes.barh([row + shift for row in rows], same, height=height, color="C0", label="same plan")
    words = [f"{gain:+.1f}%" + ("" if fit else " (too big)") for gain, fit in zip(same, fits, strict=True)]
    axes.bar_label(bars, words, padding=3, fontsize="small")
    if searched:
        best = [100 * change.gain(change.best) if change.best is not None else 0.0 for change in ordered]
        bars = axes.barh(
            [row - shift for row in rows], best, height=height, color="C1", label="best plan, searched again"
        )
        axes.bar_label(bars, [f"{gain:+.1f}%" for gain in best], padding=3, fontsize="small")
        axes.legend(frameon=False, loc="lower right")
    axes.set_yticks(rows, [f"{change.what}\n{change.before} to {change.after}" for change in ordered], fontsize="small")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the throughput in tokens/s (%)")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    base = ordered[0].base
    axes.set_title(
        f"{base.model.name} on {base.cluster.num_gpus} GPUs of {base.cluster.name}: more of one thing at a time"
    )
    return _bytes(figure, picture)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot: whoever draws in a notebook keeps the backend and the figures that are open there.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bytes(figure: Figure, picture: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=150)
    return buffer.getvalue()
