"""Least squares through kernel timings: one matmul curve, or one attention entry, at a time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TypeVar

import msgspec

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator
from simllm.kernels.attention import AttentionModel, flash_attention_time
from simllm.kernels.device import bind_attention, bind_matmul
from simllm.kernels.matmul import matmul_time
from simllm.kernels.measurements import harness_time
from simllm.kernels.rows import AttentionRow, MatmulRow, StreamRow
from simllm.kernels.schema import AttentionEntry, FitParameter, FormFile, MatmulEntry, Quantity, Residual
from simllm.units import to_si

__all__ = [
    "attention_seconds",
    "fit_attention",
    "fit_matmul",
    "fit_stream",
    "left_out_times",
    "require_scipy",
    "residual",
]

Row = TypeVar("Row", MatmulRow, AttentionRow, StreamRow)


def require_scipy() -> None:
    """Refuse to fit without scipy, before anything is measured or read.

    Raises
    ------
    InputError
        It is not installed.
    """
    if find_spec("scipy") is None:
        raise InputError("a fit needs scipy; install it with: pip install 'simllm[calibrate]'")


def fit_matmul(
    rows: Sequence[MatmulRow],
    accelerator: Accelerator,
    form: FormFile,
    precision: str,
    start: MatmulEntry,
    fixed: Sequence[str] = (),
) -> MatmulEntry:
    """The curve through timed matmuls of one precision.

    Parameters
    ----------
    rows : sequence of MatmulRow
        Timings, at least one.
    accelerator : Accelerator
        The device the rows were timed on.
    form : FormFile
        Common constants and settings of the fit.
    precision : str
        Precision of all rows.
    start : MatmulEntry
        Curve that stays where the rows cannot tell: ``fixed`` parameters, and all but the rate when rows are few.
    fixed : sequence of str
        Parameters not fitted.
    """
    settings = {
        name: parameter
        for name, parameter in form.fit.matmul.items()
        if name not in fixed
        and (start.quantise_bytes is not None or not name.startswith("quantise"))
        and (name != "harness" or any(row.harness for row in rows))
    }
    if len(rows) < form.fit.few_rows:
        settings = {"rate": settings["rate"]}
    base = bind_matmul(accelerator, start, form, precision)
    field = {"launch": "launch_s", "quantise_bytes": "dynamic_bytes", "quantise_launch": "dynamic_launch_s"}

    def seconds(values: Mapping[str, float]) -> list[float]:
        in_si = {field.get(name, name): to_si(value, settings[name].unit) for name, value in values.items()}
        harness = in_si.pop("harness", 0.0)
        model = replace(base, **in_si)  # type: ignore[arg-type]
        return [
            matmul_time(model, row.m, row.n, row.k, row.count, row.quantise) + harness * row.harness for row in rows
        ]

    values = _least_squares(rows, settings, seconds, form)
    return msgspec.structs.replace(start, **{name: _rounded(values[name], settings[name].unit) for name in settings})


def fit_attention(
    rows: Sequence[AttentionRow], accelerator: Accelerator, form: FormFile, start: AttentionEntry, efficiency: float
) -> AttentionEntry:
    """The rates, tile overhead and benchmark overhead through timed attention kernels of one direction.

    Parameters
    ----------
    rows : sequence of AttentionRow
        Timings of one implementation in one direction.
    accelerator, form, start
        As in `fit_matmul`; head sizes that no row has keep the rate of ``start``.
    efficiency : float
        Share of the memory bandwidth that streaming kernels reach.
    """
    backward = rows[0].direction == "backward"
    sizes = sorted({round((row.head_dim + row.v_head_dim) / 2) for row in rows})
    settings = {f"rate {size}": form.fit.attention["rate"] for size in sizes}
    if len(rows) >= form.fit.few_rows:
        settings |= {name: form.fit.attention[name] for name in ("overhead_tokens", "tail_tiles")}
    if len({row.work_fraction for row in rows}) > 1 and len(rows) >= 2 * form.fit.few_rows:
        settings["masked"] = form.fit.attention["masked"]
    if any(row.harness for row in rows):
        settings["harness"] = form.fit.attention["harness"]

    def entry(values: Mapping[str, float], rounded: bool = False) -> AttentionEntry:
        rate = dict(start.rate)
        for size in sizes:
            rate[size] = values[f"rate {size}"]
        changes = {name: _rounded(values[name], settings[name].unit, rounded) for name in settings if " " not in name}
        cost = 0.0
        for size in sorted(rate):  # A wider head never costs less.
            cost = max(cost, size / rate[size])
            rate[size] = round(size / cost, 4) if rounded else size / cost
        return msgspec.structs.replace(start, rate=rate, **changes)

    def seconds(values: Mapping[str, float]) -> list[float]:
        trial = entry(values)
        model = bind_attention(accelerator, trial, form, backward, efficiency, rows[0].precision)
        bandwidth = accelerator.memory_bandwidth * efficiency
        return [attention_seconds(row, model) + harness_time(row, trial, bandwidth) for row in rows]

    return entry(_least_squares(rows, settings, seconds, form), rounded=True)


def attention_seconds(row: AttentionRow, model: AttentionModel) -> float:
    """Seconds the model gives to the kernel of a row, without what its benchmark adds."""
    return flash_attention_time(
        model,
        row.batch,
        row.heads,
        row.kv_heads,
        row.seq_len,
        row.seq_len,
        row.head_dim,
        row.v_head_dim,
        row.work_fraction,
    )


def left_out_times(
    rows: Sequence[Row],
    fit: Callable[[Sequence[Row]], Any],
    price: Callable[[Any, Sequence[Row]], list[float]],
    form: FormFile,
) -> dict[int, float]:
    """Seconds that each row gets from a fit without its shape (folds by shape), by row; none where rows are too few."""
    if len(rows) < form.fit.few_rows:
        return {}
    shapes = sorted({row.shape for row in rows})
    random.Random(0).shuffle(shapes)
    fold = {shape: place % form.fit.folds for place, shape in enumerate(shapes)}
    found: dict[int, float] = {}
    for number in range(form.fit.folds):
        test = [row for row in rows if fold[row.shape] == number]
        rest = [row for row in rows if fold[row.shape] != number]
        if test and rest:
            seconds = price(fit(rest), test)
            found |= {row.index: time_s for row, time_s in zip(test, seconds, strict=True)}
    return found


def residual(
    rows: Sequence[Row], fitted_s: Mapping[int, float], left_out_s: Mapping[int, float], rule: str
) -> Residual:
    """Errors of a fit over the rows worth scoring, in sample and, where these are known, with their shape left out.

    Parameters
    ----------
    rows : sequence of rows
        What was fitted.
    fitted_s, left_out_s : mapping of int to float
        Seconds by row: of the fit, and of fits without the row's shape.
    rule : str
        Which rows are worth scoring, in words.
    """
    scored = [row for row in rows if row.scored] or list(rows)
    errors = [abs(fitted_s[row.index] / row.time_s - 1) for row in scored]
    left_out = [abs(left_out_s[row.index] / row.time_s - 1) for row in scored if row.index in left_out_s]
    return Residual(
        rows=len(rows),
        scored=len(scored),
        rule=rule,
        median=round(statistics.median(errors), 4),
        p90=round(_quantile(errors, 0.9), 4),
        held_out_median=round(statistics.median(left_out), 4) if left_out else None,
        held_out_p90=round(_quantile(left_out, 0.9), 4) if left_out else None,
    )


def fit_stream(rows: Sequence[StreamRow], bandwidth: float, launch_s: float) -> float:
    """The share of the bandwidth that kernels of one kind reach: the median over rows, launches taken off.

    Parameters
    ----------
    rows : sequence of StreamRow
        Timings of one kind.
    bandwidth : float
        Memory bandwidth, bytes/s.
    launch_s : float
        Shortest time of a kernel.
    """
    large = [row for row in rows if row.scored] or list(rows)
    # A row that takes no longer than its launches says nothing of the memory; half its time is taken to be streaming.
    return statistics.median(
        row.size_bytes / bandwidth / max(row.time_s - row.kernels * launch_s, row.time_s / 2) for row in large
    )


def _least_squares(
    rows: Sequence[Row],
    settings: Mapping[str, FitParameter],
    seconds: Callable[[Mapping[str, float]], list[float]],
    form: FormFile,
) -> dict[str, float]:
    import numpy as np
    from scipy.optimize import least_squares

    names = list(settings)
    low = np.array([settings[name].low for name in names])
    high = np.array([settings[name].high for name in names])
    usual = np.array([settings[name].usual for name in names])
    width = np.array([settings[name].width for name in names])
    measured = np.array([row.time_s for row in rows])
    weight = np.array([1.0 if row.scored else form.fit.small_weight for row in rows])
    pull = form.fit.pull * math.sqrt(len(rows) / 10)

    def residuals(z: Any) -> Any:
        values = dict(zip(names, np.clip(usual + z * width, low, high).tolist(), strict=True))
        return np.concatenate([weight * np.log(np.array(seconds(values)) / measured), pull * z])

    found = [
        least_squares(
            residuals,
            np.clip(np.full(len(names), shift), (low - usual) / width + 1e-6, (high - usual) / width - 1e-6),
            bounds=((low - usual) / width, (high - usual) / width),
            loss="soft_l1",
            f_scale=form.fit.soft_l1,
            diff_step=1e-3,
            x_scale=1.0,
        )
        for shift in (0.0, 0.2, -0.2)
    ]
    best = min(found, key=lambda result: float(result.cost))
    return dict(zip(names, np.clip(usual + best.x * width, low, high).tolist(), strict=True))


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _rounded(value: float, unit: str, rounded: bool = True) -> Quantity:
    return Quantity(value=float(f"{round(value, 9):.4g}") if rounded else value, unit=unit)
