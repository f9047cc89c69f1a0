"""Fitting kernel profiles to tables of kernel timings, and writing them.

`fit_kernels` turns rows (see `simllm.kernels.measurements`) into profile files; the shipped entries with basis
``measured`` are what it makes of ``tests/published/kernels.csv`` and ``tests/published/attention_papers.csv``. Nothing
is fitted to training runs here. Needs scipy (extra ``calibrate``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator, load_accelerator
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
from simllm.kernels.measurements import AttentionRow, MatmulRow, SkippedRow, StreamRow, harness_time, parse_rows
from simllm.kernels.memory import memory_bound_time
from simllm.kernels.profile import KernelProfile, kernel_folder, load_form, load_kernel_profile, own_kernel_profile
from simllm.kernels.schema import (
    AttentionDirections,
    AttentionEntry,
    FormFile,
    Fraction,
    KernelFile,
    MatmulEntry,
    Quantity,
    Residual,
    Seconds,
    read_kernels,
)

__all__ = ["Calibration", "fit_kernels"]

Row = TypeVar("Row", MatmulRow, AttentionRow)
AnyRow = TypeVar("AnyRow", MatmulRow, AttentionRow, StreamRow)
#: Name of the stream rows that time kernels of next to no bytes.
_LAUNCH = "launch"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a table of timings says.

    Attributes
    ----------
    profiles : mapping of str to KernelFile
        New profile files by accelerator.
    skipped : tuple of SkippedRow
        Rows that entered none of them.
    measured_s, fitted_s, left_out_s : mapping of int to float
        Seconds by number of the row: measured, of the fit that the row entered, and of fits without the row's shape
        (folds by shape; only where the curve has rows enough and `fit_kernels` was asked for it).
    """

    profiles: Mapping[str, KernelFile]
    skipped: tuple[SkippedRow, ...]
    measured_s: Mapping[int, float]
    fitted_s: Mapping[int, float]
    left_out_s: Mapping[int, float]


def fit_kernels(
    table: Iterable[Mapping[str, object]],
    *,
    accelerators: Sequence[str] | None = None,
    folder: Path | None = None,
    held_out: bool = True,
    device: Accelerator | None = None,
    borrows: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Fit every matmul curve, attention entry and streaming efficiency that the rows show.

    An entry of an existing file says by ``libraries`` which rows are its own, so that two populations are not mixed;
    rows of a library that the file does not name are skipped with that reason. A device without a file, or a precision
    or implementation without an entry, gets one from all its rows, if they are enough. Entries whose basis is not
    ``measured`` stay as they are.

    Parameters
    ----------
    table : iterable of mapping
        Rows by column name.
    accelerators : sequence of str, optional
        Only these.
    folder : Path, optional
        Folder of kernel files that say what belongs to whom; the shipped one if left out.
    held_out : bool
        Whether to state errors on shapes left out of the fit too (one more fit for each fold).
    device : Accelerator, optional
        The device that all rows were timed on, whatever they say; it need not be in the catalog.
    borrows : str, optional
        Device of the catalog whose entries stand in for what the rows do not show; by its class if left out.
    progress : callable, optional
        Called with the number of devices done after each.

    Returns
    -------
    Calibration
        Profile files ready for `simllm.kernels.write.write_profiles`.
    """
    folder = folder or kernel_folder()
    rows = parse_rows(table, folder, device.name if device else None)
    timed: list[MatmulRow | AttentionRow | StreamRow] = [*rows.matmuls, *rows.attentions, *rows.streams]
    names = sorted({row.accelerator for row in timed})
    results = _Results(skipped=list(rows.skipped))
    profiles: dict[str, KernelFile] = {}
    for done, name in enumerate([name for name in names if accelerators is None or name in accelerators], start=1):
        accelerator = device or load_accelerator(name)
        profiles |= _fit_device(
            _Device(
                accelerator=accelerator,
                form=load_form(folder),
                profile=_profile(accelerator, folder, borrows),
                file=_own_file(accelerator, folder, borrows),
                held_out=held_out,
                results=results,
            ),
            [row for row in rows.matmuls if row.accelerator == name],
            [row for row in rows.attentions if row.accelerator == name],
            [row for row in rows.streams if row.accelerator == name],
        )
        if progress is not None:
            progress(done)
    return Calibration(
        profiles=profiles,
        skipped=tuple(sorted(results.skipped, key=lambda row: row.index)),
        measured_s={row.index: row.time_s for row in timed},
        fitted_s=results.fitted_s,
        left_out_s=results.left_out_s,
    )


@dataclass(frozen=True, kw_only=True)
class _Results:
    """What happened to the rows, filled while devices are fitted."""

    skipped: list[SkippedRow]
    fitted_s: dict[int, float] = field(default_factory=dict)
    left_out_s: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Device:
    """One accelerator being calibrated: what is known of it, and where results are noted."""

    accelerator: Accelerator
    form: FormFile
    profile: KernelProfile
    file: KernelFile
    held_out: bool
    results: _Results

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


def _profile(accelerator: Accelerator, folder: Path, borrows: str | None) -> KernelProfile:
    if accelerator.kernels is not None:
        return own_kernel_profile(accelerator.name, accelerator.kernels)
    return load_kernel_profile(borrows or accelerator.name, accelerator.vendor, folder)


def _own_file(accelerator: Accelerator, folder: Path, borrows: str | None) -> KernelFile:
    path = accelerator.kernels or folder / f"{accelerator.name}.yaml"
    if path.is_file():
        return read_kernels(path)
    lender = load_kernel_profile(borrows or accelerator.name, accelerator.vendor, folder).files[0]
    return KernelFile(kind="kernels", name=accelerator.name, borrows=lender, note="Calibrated from measured rows.")


def _fit_device(
    device: _Device, matmuls: list[MatmulRow], attentions: list[AttentionRow], streams: list[StreamRow]
) -> dict[str, KernelFile]:
    """The new file of a device by its name; nothing if no row belongs to it."""
    file = _fit_streams(device, streams)
    if streams:
        efficiency = file.memory_efficiency.si if file.memory_efficiency else device.profile.memory_efficiency
        device = replace(device, profile=replace(device.profile, memory_efficiency=efficiency))
    curves = _fit_curves(device, matmuls)
    entries = _fit_entries(device, attentions, curves)
    if not (curves or entries or streams):
        return {}
    new = msgspec.structs.replace(
        file,
        matmul={**file.matmul, **curves},
        attention={**file.attention, **entries},
        fitted_against=_figures(device.accelerator),
        launch=file.launch if streams else _launch(file, curves),
    )
    return {device.accelerator.name: new}


def _fit_streams(device: _Device, rows: list[StreamRow]) -> KernelFile:
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


def _fit_curves(device: _Device, rows: list[MatmulRow]) -> dict[str, MatmulEntry]:
    form, file, name = device.form, device.file, device.accelerator.name
    fitted: dict[str, MatmulEntry] = {}
    # 16-bit precisions stand first in the form: the narrower ones share their memory and launch.
    for precision, format_of in form.precisions.items():
        known = file.matmul.get(precision)
        own = [row for row in rows if row.precision == precision]
        own = _claimed(own, known.libraries if known else [], device.results.skipped)
        if known is not None and known.basis != "measured":
            _skip(device, own, f"the {precision} curve of {name} is {known.basis} on purpose")
        elif known is None and len(own) < form.fit.few_rows:
            _skip(device, own, f"{name} has no {precision} curve, and {len(own)} rows are too few for one")
        elif format_of.peak not in device.accelerator.peak_flops:
            _skip(device, own, f"{name} has no {format_of.peak} rate")
        elif own:
            fitted[precision] = _matmul_entry(device, own, precision, {**file.matmul, **fitted})
    return fitted


def _fit_entries(
    device: _Device, rows: list[AttentionRow], curves: Mapping[str, MatmulEntry]
) -> dict[str, AttentionDirections]:
    name = device.accelerator.name
    known_curves = {**device.profile.matmul, **curves}
    wide = next((precision for precision in ("bf16", "fp16") if precision in known_curves), next(iter(known_curves)))
    fitted: dict[str, AttentionDirections] = {}
    for implementation, direction in sorted({(row.implementation, row.direction) for row in rows}):
        both = fitted.get(implementation) or device.file.attention.get(implementation, AttentionDirections())
        known = both.forward if direction == "forward" else both.backward
        own = [row for row in rows if (row.implementation, row.direction) == (implementation, direction)]
        own = _claimed(own, known.libraries if known else [], device.results.skipped)
        what = f"{implementation} {direction} attention"
        if implementation == "unfused":
            _skip(device, own, "unfused attention has no curve of its own: it is matmuls and their traffic")
        elif known is not None and known.basis != "measured":
            _skip(device, own, f"{what} of {name} is {known.basis} on purpose")
        elif known is None and len(own) < device.form.fit.few_rows:
            _skip(device, own, f"{name} has no {what}, and {len(own)} rows are too few for it")
        elif own:
            curve = own[0].precision if own[0].precision in known_curves else wide
            entry = _attention_entry(device, own, known, known_curves[curve].launch)
            fitted[implementation] = msgspec.structs.replace(both, **{direction: entry})
    return fitted


def _skip(device: _Device, rows: Sequence[MatmulRow] | Sequence[AttentionRow], reason: str) -> None:
    device.results.skipped.extend(SkippedRow(index=row.index, reason=reason) for row in rows)


def _claimed(rows: list[Row], libraries: Sequence[str], skipped: list[SkippedRow]) -> list[Row]:
    if not libraries:
        return rows
    claimed = []
    for row in rows:
        if row.library.startswith(tuple(libraries)):
            claimed.append(row)
        else:
            reason = f"library={row.library} is not one that {row.accelerator} is fitted to ({', '.join(libraries)})"
            skipped.append(SkippedRow(index=row.index, reason=reason))
    return claimed


def _matmul_entry(
    device: _Device, rows: list[MatmulRow], precision: str, curves: Mapping[str, MatmulEntry]
) -> MatmulEntry:
    accelerator, form = device.accelerator, device.form
    size = form.precisions[precision].element.si("bytes")
    kept = []
    for row in rows:
        touched = row.count * (size * row.k * (row.m + row.n) + 2 * row.m * row.n) / row.time_s
        if touched > accelerator.memory_bandwidth:
            _skip(device, [row], f"ran from cache: {touched / 1e9:.0f} GB/s is more than {accelerator.name} has")
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


def _attention_entry(
    device: _Device, rows: list[AttentionRow], known: AttentionEntry | None, launch: Quantity
) -> AttentionEntry:
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


def _launch(file: KernelFile, curves: Mapping[str, MatmulEntry]) -> Seconds | None:
    """Launch of small kernels: that of the 16-bit curve, unless the file has one from elsewhere."""
    wide = next((curves[p] for p in ("bf16", "fp16") if p in curves and curves[p].basis == "measured"), None)
    if wide is None or (wide.residual and wide.residual.rows < 2) or (file.launch and file.launch.basis != "derived"):
        return file.launch
    source = "launch of the 16-bit matmul curve of this file"
    return Seconds(value=wide.launch.value, unit=wide.launch.unit, source=source, basis="derived")


def _sources(rows: Sequence[MatmulRow] | Sequence[AttentionRow] | Sequence[StreamRow]) -> str:
    return "; ".join(sorted({row.source for row in rows}))


def _libraries(rows: Sequence[MatmulRow] | Sequence[AttentionRow]) -> list[str]:
    return sorted({row.library for row in rows})


def _figures(accelerator: Accelerator) -> dict[str, Quantity]:
    rates = {name: rate for name, rate in accelerator.peak_flops.items() if name != "int8"}
    return {f"peak_{name}": Quantity(value=rate / 1e12, unit="TFLOP/s") for name, rate in rates.items()} | {
        "memory_bandwidth": Quantity(value=accelerator.memory_bandwidth / 1e9, unit="GB/s"),
        "compute_units": Quantity(value=float(accelerator.compute_units or 1), unit="count"),
    }
