"""Fitting kernel profiles to tables of kernel timings.

`fit_kernels` turns rows (see `simllm.kernels.measurements`) into profile files; the shipped entries with basis
``measured`` are what it makes of ``tests/published/kernels.csv`` and ``tests/published/attention_papers.csv``. Nothing
is fitted to training runs here. Needs scipy (extra ``calibrate``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.kernels.entries import Device, Results, attention_entry, matmul_entry, skip, stream_file
from simllm.kernels.fitting import require_scipy
from simllm.kernels.measurements import parse_rows
from simllm.kernels.profile import KernelProfile, kernel_folder, load_form, load_kernel_profile, own_kernel_profile
from simllm.kernels.rows import AttentionRow, MatmulRow, SkippedRow, StreamRow
from simllm.kernels.schema import AttentionDirections, KernelFile, MatmulEntry, Quantity, Seconds, read_kernels

__all__ = ["Calibration", "fit_kernels"]

Row = TypeVar("Row", MatmulRow, AttentionRow)


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
    require_scipy()
    folder = folder or kernel_folder()
    rows = parse_rows(table, folder, device.name if device else None)
    timed: list[MatmulRow | AttentionRow | StreamRow] = [*rows.matmuls, *rows.attentions, *rows.streams]
    names = sorted({row.accelerator for row in timed})
    results = Results(skipped=list(rows.skipped))
    profiles: dict[str, KernelFile] = {}
    for done, name in enumerate([name for name in names if accelerators is None or name in accelerators], start=1):
        accelerator = device or load_accelerator(name)
        profiles |= _fit_device(
            Device(
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
    device: Device, matmuls: list[MatmulRow], attentions: list[AttentionRow], streams: list[StreamRow]
) -> dict[str, KernelFile]:
    """The new file of a device by its name; nothing if no row belongs to it."""
    file = stream_file(device, streams)
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


def _fit_curves(device: Device, rows: list[MatmulRow]) -> dict[str, MatmulEntry]:
    form, file, name = device.form, device.file, device.accelerator.name
    fitted: dict[str, MatmulEntry] = {}
    # 16-bit precisions stand first in the form: the narrower ones share their memory and launch.
    for precision, format_of in form.precisions.items():
        known = file.matmul.get(precision)
        own = [row for row in rows if row.precision == precision]
        own = _claimed(own, known.libraries if known else [], device.results.skipped)
        if known is not None and known.basis != "measured":
            skip(device, own, f"the {precision} curve of {name} is {known.basis} on purpose")
        elif known is None and len(own) < form.fit.few_rows:
            skip(device, own, f"{name} has no {precision} curve, and {len(own)} rows are too few for one")
        elif format_of.peak not in device.accelerator.peak_flops:
            skip(device, own, f"{name} has no {format_of.peak} rate")
        elif own:
            fitted[precision] = matmul_entry(device, own, precision, {**file.matmul, **fitted})
    return fitted


def _fit_entries(
    device: Device, rows: list[AttentionRow], curves: Mapping[str, MatmulEntry]
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
            skip(device, own, "unfused attention has no curve of its own: it is matmuls and their traffic")
        elif known is not None and known.basis != "measured":
            skip(device, own, f"{what} of {name} is {known.basis} on purpose")
        elif known is None and len(own) < device.form.fit.few_rows:
            skip(device, own, f"{name} has no {what}, and {len(own)} rows are too few for it")
        elif own:
            curve = own[0].precision if own[0].precision in known_curves else wide
            entry = attention_entry(device, own, known, known_curves[curve].launch)
            fitted[implementation] = msgspec.structs.replace(both, **{direction: entry})
    return fitted


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


def _launch(file: KernelFile, curves: Mapping[str, MatmulEntry]) -> Seconds | None:
    """Launch of small kernels: that of the 16-bit curve, unless the file has one from elsewhere."""
    wide = next((curves[p] for p in ("bf16", "fp16") if p in curves and curves[p].basis == "measured"), None)
    if wide is None or (wide.residual and wide.residual.rows < 2) or (file.launch and file.launch.basis != "derived"):
        return file.launch
    source = "launch of the 16-bit matmul curve of this file"
    return Seconds(value=wide.launch.value, unit=wide.launch.unit, source=source, basis="derived")


def _figures(accelerator: Accelerator) -> dict[str, Quantity]:
    rates = {name: rate for name, rate in accelerator.peak_flops.items() if name != "int8"}
    return {f"peak_{name}": Quantity(value=rate / 1e12, unit="TFLOP/s") for name, rate in rates.items()} | {
        "memory_bandwidth": Quantity(value=accelerator.memory_bandwidth / 1e9, unit="GB/s"),
        "compute_units": Quantity(value=float(accelerator.compute_units or 1), unit="count"),
    }
