"""Pictures of models: where the parameters and the FLOPs of one model sit, and of several side by side.

Pictures come back as bytes in the format asked for; matplotlib is loaded in the functions and needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from simllm.models import Model
from simllm.report.models import component_words, format_flops
from simllm.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison", "plot_model"]

#: Shares below this have no number in a stacked bar: it would not fit.
_SMALLEST_LABEL = 0.06


def plot_model(model: Model, seq_len: int, picture: str) -> bytes:
    """Parameters and forward FLOPs of a model by component.

    Parameters
    ----------
    model : Model
    seq_len : int
        Length of the sequence whose FLOPs are shown; of attention, attended pairs only.
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    figure, (left, right) = _figure(4.5)
    parameters, flops = model.parameters, model.flops(seq_len)
    _bars(left, parameters.by_component, format_count)
    _bars(right, flops.by_component, format_flops)
    left.set_title(f"parameters: {format_count(parameters.total)}")
    right.set_title(f"forward FLOPs of {seq_len} tokens: {format_flops(flops.forward_masked)}")
    figure.suptitle(f"{model.name}: where parameters and FLOPs sit")
    return _bytes(figure, picture)


def _bars(axes: Axes, parts: Mapping[str, int], words: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    total = sum(parts.values())
    shown = sorted(((count, name) for name, count in parts.items() if count), key=lambda item: item[0])
    bars = axes.barh([component_words(name) for _, name in shown], [count for count, _ in shown])
    axes.bar_label(bars, [f"{words(count)}, {count / total:.1%}" for count, _ in shown], padding=3, fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axes.margins(x=0.35)
    axes.spines[["top", "right"]].set_visible(False)


def plot_comparison(models: Sequence[Model], seq_len: int, picture: str) -> bytes:
    """Shares of the components in parameters and forward FLOPs, a bar a model.

    Parameters
    ----------
    models : sequence of Model
    seq_len : int
        Length of the sequence whose FLOPs are shown; of attention, attended pairs only.
    picture : str
        ``png``, ``svg`` or ``pdf``.
    """
    figure, (left, right) = _figure(2.2 + 0.5 * len(models))
    parameters = [(model.name, model.parameters.by_component) for model in models]
    flops = [(model.name, model.flops(seq_len).by_component) for model in models]
    totals = [parts for _, parts in (*parameters, *flops)]
    order = list(dict.fromkeys(name for parts in totals for name, count in parts.items() if count))
    _stacked(left, parameters, order, format_count)
    _stacked(right, flops, order, format_flops)
    left.set_xlabel("share of parameters (%)")
    right.set_xlabel(f"share of the forward FLOPs of {seq_len} tokens (%)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside lower center", ncols=5)
    figure.suptitle("where parameters and FLOPs sit")
    return _bytes(figure, picture)


def _stacked(
    axes: Axes,
    models: Sequence[tuple[str, Mapping[str, int]]],
    order: Sequence[str],
    words: Callable[[float], str],
) -> None:
    from matplotlib import colormaps

    totals = [sum(parts.values()) for _, parts in models]
    names = [f"{name}  {words(total)}" for (name, _), total in zip(models, totals, strict=True)]
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    # Dark tones first, then the light ones, so that neighbours differ.
    tones = (*colours[::2], *colours[1::2])
    # Places, not names: a model may be there twice.
    places = list(range(len(models)))
    floor = [0.0] * len(models)
    for number, component in enumerate(order):
        shares = [parts.get(component, 0) / total for (_, parts), total in zip(models, totals, strict=True)]
        bars = axes.barh(
            places,
            [100 * share for share in shares],
            left=floor,
            label=component_words(component),
            color=tones[number % len(tones)],
        )
        labels = [f"{100 * share:.0f}" if share >= _SMALLEST_LABEL else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", fontsize="small", color="white" if number < 10 else "black")
        floor = [bottom + 100 * share for bottom, share in zip(floor, shares, strict=True)]
    axes.set_yticks(places, names)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _figure(height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    # Without pyplot: whoever draws in a notebook keeps the backend and the figures that are open there.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    axes = figure.subplots(1, 2)
    return figure, (axes[0], axes[1])


def _bytes(figure: Figure, picture: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture, dpi=150)
    return buffer.getvalue()
