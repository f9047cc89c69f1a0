"""One entry of a kernel profile at a time: from the rows that are its own to fitted figures with their errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator
from simllm.kernels.device import bind_attention, bind_matmul
from simllm.kernels.fitting import (
    attention_seconds,
    fit_attention,
    fit_matmul,
    fit_stream,
    left_out_times,
    residual,
)
from simllm.kernels.matmul import matmul_time
from simllm.kernels.measurements import harness_time
from simllm.kernels.memory import memory_bound_time
from simllm.kernels.profile import KernelProfile
from simllm.kernels.rows import AttentionRow, MatmulRow, SkippedRow, StreamRow
from simllm.kernels.schema import (
    AttentionEntry,
    FormFile,
    Fraction,
    KernelFile,
    MatmulEntry,
    Quantity,
    Residual,
    Seconds,
)

__all__ = ["Device", "Results", "attention_entry", "matmul_entry", "skip", "stream_file"]

AnyRow = TypeVar("AnyRow", MatmulRow, AttentionRow, StreamRow)
#: Name of the stream rows that time kernels of next to no bytes.
_LAUNCH = "launch"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What happened to the rows, filled while devices are fitted."""

    skipped: list[SkippedRow]
    fitted_s: dict[int, float] = field(default_factory=dict)
    left_out_s: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator being calibrated: what is known of it, and where results are noted."""

    accelerator: Accelerator
    form: FormFile
    profile: KernelProfile
    file: KernelFile
    held_out: bool
    results: Results

    def conclude(
        self,
        rows: Sequence[AnyRow],
        fit: Callable[[Sequence[AnyRow]], Any],
        price: Callable[[Any, Sequence[AnyRow]], list[float]],
        rule: str,
    ) -> tuple[Any, Residual]:
        """The fit of all rows, and its errors; times in sample and left out are noted."""
        fitted = fit(rows)
        in_sample = {row.index: time_s for row, time_s in zip(rows, price(fitted, rows), strict=True)}
        left_out = left_out_times(rows, fit, price, self.form) if self.held_out else {}
        self.results.fitted_s.update(in_sample)
        self.results.left_out_s.update(left_out)
        return fitted, residual(rows, in_sample, left_out, rule)


def skip(device: Device, rows: Sequence[MatmulRow] | Sequence[AttentionRow], reason: str) -> None:
    """Note that rows are not fitted, and why."""
    device.results.skipped.extend(SkippedRow(index=row.index, reason=reason) for row in rows)


def stream_file(device: Device, rows: list[StreamRow]) -> KernelFile:
    """The file with the launch, the efficiency of each kind of kernel, and the middle of these for all others."""
    if not rows:
        return device.file
    source = _sources(rows)
    launches = [row.time_s / row.kernels for row in rows if row.kind == _LAUNCH]
    launch_s = statistics.median(launches) if launches else device.profile.launch_s
    bandwidth = device.accelerator.memory_bandwidth

    def price(efficiency: float, chosen: Sequence[StreamRow]) -> list[float]:
        return [
            row.kernels * memory_bound_time(row.size_bytes / row.kernels, bandwidth, efficiency, launch_s)
            for row in chosen
        ]

    found: dict[str, Fraction] = {}
    residuals: dict[str, Residual] = {}
    for kind in sorted({row.kind for row in rows} - {_LAUNCH}):
        own = [row for row in rows if row.kind == kind]
        efficiency, residuals[kind] = device.conclude(
            own, lambda chosen: fit_stream(chosen, bandwidth, launch_s), price, "1 MiB and more"
        )
        found[kind] = Fraction(value=float(f"{efficiency:.4g}"), unit="fraction", source=source, basis="measured")
    changes: dict[str, object] = {}
    if found:
        middle = statistics.median(figure.si for figure in found.values())
        changes["memory_efficiency"] = Fraction(
            value=float(f"{middle:.4g}"), unit="fraction", source=source, basis="measured", note="middle of the kinds"
        )
    if launches:
        changes["launch"] = Seconds(value=float(f"{launch_s * 1e6:.4g}"), unit="us", source=source, basis="measured")
    return msgspec.structs.replace(
        device.file,
        stream_efficiency={**device.file.stream_efficiency, **found},
        stream_residual={**device.file.stream_residual, **residuals},
        **changes,
    )


def matmul_entry(
    device: Device, rows: list[MatmulRow], precision: str, curves: Mapping[str, MatmulEntry]
) -> MatmulEntry:
    """The curve of one precision through its rows, those left aside that ran from cache."""
    accelerator, form = device.accelerator, device.form
    size = form.precisions[precision].element.si("bytes")
    kept = []
    for row in rows:
        touched = row.count * (size * row.k * (row.m + row.n) + 2 * row.m * row.n) / row.time_s
        if touched > accelerator.memory_bandwidth:
            skip(device, [row], f"ran from cache: {touched / 1e9:.0f} GB/s is more than {accelerator.name} has")
        else:
            kept.append(row)
    known = {**device.profile.matmul, **curves}
    start = known[next(name for name in form.precisions[precision].curves if name in known)]
    fixed: tuple[str, ...] = ()
    if form.precisions[precision].cast is not None:
        # A known entry that says nothing of quantisation comes from rows with operands quantised before.
        if precision not in curves:
            usual = {name: form.fit.matmul[name] for name in ("quantise_bytes", "quantise_launch")}
            start = msgspec.structs.replace(
                start, **{name: Quantity(value=p.usual, unit=p.unit) for name, p in usual.items()}
            )
        wide = next((name for name in ("bf16", "fp16") if name in curves), None)
        if wide is not None:
            fixed = ("memory", "launch")
            start = msgspec.structs.replace(start, memory=curves[wide].memory, launch=curves[wide].launch)

    def fit(chosen: Sequence[MatmulRow]) -> MatmulEntry:
        return fit_matmul(chosen, accelerator, form, precision, start, fixed)

    def price(entry: MatmulEntry, chosen: Sequence[MatmulRow]) -> list[float]:
        model = bind_matmul(accelerator, entry, form, precision)
        return [
            matmul_time(model, row.m, row.n, row.k, row.count, row.quantise)
            + harness_time(row, entry, accelerator.memory_bandwidth)
            for row in chosen
        ]

    fitted, errors = device.conclude(kept, fit, price, "m, n, k >= 1024")
    entry: MatmulEntry = msgspec.structs.replace(
        fitted,
        basis="measured",
        source=_sources(kept),
        note=curves[precision].note if precision in curves else "",
        libraries=curves[precision].libraries if precision in curves else _libraries(kept),
        residual=errors,
    )
    return entry


def attention_entry(
    device: Device, rows: list[AttentionRow], known: AttentionEntry | None, launch: Quantity
) -> AttentionEntry:
    """One implementation in one direction through its rows."""
    accelerator, form, efficiency = device.accelerator, device.form, device.profile.memory_efficiency
    backward = rows[0].direction == "backward"
    if known is None:
        # The nearest entry lends what the rows cannot tell: the same implementation borrowed, else any of the device.
        lent = [device.profile.attention.get(rows[0].implementation), *device.profile.attention.values()]
        entries = [entry for both in lent if both for entry in (both.forward, both.backward) if entry]
        if not entries:
            raise InputError(
                f"{accelerator.name} has no attention entry to start from; let its file borrow from a sibling"
            )
        sizes = {round((row.head_dim + row.v_head_dim) / 2) for row in rows}
        precisions = {row.precision for row in rows}
        known = msgspec.structs.replace(
            entries[0],
            rate=dict.fromkeys(sorted(sizes), max(entries[0].rate.values())),  # all of them are fitted
            precisions=("bf16", "fp16") if precisions & {"bf16", "fp16"} else tuple(sorted(precisions)),
            libraries=_libraries(rows),
            note="",
        )
    start = msgspec.structs.replace(known, launch=launch)

    def fit(chosen: Sequence[AttentionRow]) -> AttentionEntry:
        return fit_attention(chosen, accelerator, form, start, efficiency)

    def price(entry: AttentionEntry, chosen: Sequence[AttentionRow]) -> list[float]:
        model = bind_attention(accelerator, entry, form, backward, efficiency, rows[0].precision)
        bandwidth = accelerator.memory_bandwidth * efficiency
        return [attention_seconds(row, model) + harness_time(row, entry, bandwidth) for row in chosen]

    fitted, errors = device.conclude(rows, fit, price, "sequences >= 1024")
    entry: AttentionEntry = msgspec.structs.replace(
        fitted,
        basis="measured",
        source=_sources(rows),
        residual=errors,
    )
    return entry


def _sources(rows: Sequence[MatmulRow] | Sequence[AttentionRow] | Sequence[StreamRow]) -> str:
    return "; ".join(sorted({row.source for row in rows}))


def _libraries(rows: Sequence[MatmulRow] | Sequence[AttentionRow]) -> list[str]:
    return sorted({row.library for row in rows})
