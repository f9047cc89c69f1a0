"""The pipeline of one step as a picture: a row for every rank, a box for every action."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from simllm.training import Estimate
from simllm.training.timeline import StepTimeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_timeline"]

#: More actions of a rank than this are cut: the beginning and the end are shown.
_MOST_ACTIONS = 130
_SHOWN_ACTIONS = 56
_COLOURS = {
    "F": "#4c78a8",
    "B": "#f2a35e",
    "I": "#f7c48f",
    "W": "#9ecae9",
    "FB": "#b5a0c8",
    "data_parallel": "#54a24b",
    "gradient_clipping": "#d67195",
    "offload": "#9d755d",
    "optimizer": "#b279a2",
}
_OTHER = "#e45756"
_WORDS = {
    "F": "forward",
    "B": "backward",
    "I": "gradients of inputs",
    "W": "gradients of weights",
    "FB": "forward beside backward",
    "data_parallel": "gradients, parameters",
    "gradient_clipping": "gradient clipping",
    "offload": "transfers to the host",
    "optimizer": "optimizer",
}


def plot_timeline(answer: Estimate, line: StepTimeline, picture: str) -> bytes:
    """Every action of every pipeline rank; paler boxes are later model chunks, gaps are bubble.

    Parameters
    ----------
    answer : Estimate
    line : StepTimeline
        Of the same plan.
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    longest = max(len(slices) for slices in line.ranks)
    cut = longest > _MOST_ACTIONS
    figure = Figure(figsize=(13, 1.6 + (0.34 * len(line.ranks) + 0.7) * (2 if cut else 1)), layout="constrained")
    panels = list(figure.subplots(2 if cut else 1, 1, squeeze=False).flat)
    if cut:
        ends = sorted(slices[_SHOWN_ACTIONS].end_s for slices in line.ranks)
        tails = sorted(slices[-_SHOWN_ACTIONS].start_s for slices in line.ranks)
        windows = [(0.0, ends[len(ends) // 2]), (tails[len(tails) // 2], line.total_s)]
        titles = ["the beginning of the step", "its end"]
    else:
        windows, titles = [(0.0, line.total_s)], [""]
    for axes, window, title in zip(panels, windows, titles, strict=True):
        _panel(axes, line, window, answer.plan.vpp)
        axes.set_title(title, fontsize="small", loc="left")
    panels[-1].set_xlabel("seconds since the step began")
    kinds = dict.fromkeys(item.kind for slices in line.ranks for item in slices)
    boxes = [Patch(color=_COLOURS.get(kind, _OTHER), label=_WORDS.get(kind, kind)) for kind in kinds]
    figure.legend(handles=boxes, loc="outside lower center", ncols=len(boxes), frameon=False, fontsize="small")
    figure.suptitle(f"{answer.model.name}: {answer.plan.schedule}, {answer.plan}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=150)
    return buffer.getvalue()


def _panel(axes: Axes, line: StepTimeline, window: tuple[float, float], vpp: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    begin, end = window
    span = end - begin
    boxes, colours = [], []
    for rank, slices in enumerate(line.ranks):
        for item in slices:
            if item.end_s <= begin or item.start_s >= end:
                continue
            start, stop = max(begin, item.start_s), min(end, item.end_s)
            boxes.append(Rectangle((start, rank - 0.42), stop - start, 0.84))
            pale = 0.55 * max(0, item.chunk) / vpp
            red, green, blue = (tone + (1 - tone) * pale for tone in to_rgb(_COLOURS.get(item.kind, _OTHER)))
            colours.append((red, green, blue))
            if item.micro_batch >= 0 and (stop - start) / span > 0.011 * len(str(item.micro_batch)):
                axes.text((start + stop) / 2, rank, str(item.micro_batch), ha="center", va="center", fontsize=7)
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="white", linewidths=0.4))
    axes.set_xlim(begin, end)
    axes.set_ylim(len(line.ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(line.ranks)))
    axes.tick_params(axis="y", labelsize="small")
    axes.set_ylabel("pipeline rank")
    axes.spines[["top", "right"]].set_visible(False)
