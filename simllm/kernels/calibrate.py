"""Fitting kernel profiles to tables of kernel timings, and writing them.

`fit_kernels` turns rows (see `simllm.kernels.measurements`) into profile files; the shipped entries with basis
``measured`` are what it makes of ``tests/published/kernels.csv`` and ``tests/published/attention_papers.csv``. Nothing
is fitted to training runs here. Needs scipy (extra ``calibrate``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.kernels.device import bind_attention, bind_matmul
from simllm.kernels.fitting import attention_seconds, fit_attention, fit_matmul, residual
from simllm.kernels.matmul import matmul_time
from simllm.kernels.measurements import AttentionRow, MatmulRow, SkippedRow, harness_time, parse_rows
from simllm.kernels.profile import KernelProfile, kernel_folder, load_form, load_kernel_profile
from simllm.kernels.schema import (
    AttentionDirections,
    AttentionEntry,
    FormFile,
    KernelFile,
    MatmulEntry,
    Quantity,
    Seconds,
    read_kernels,
)

__all__ = ["Calibration", "fit_kernels", "write_profiles"]

Row = TypeVar("Row", MatmulRow, AttentionRow)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a table of timings says: new profile files by accelerator, and the rows that entered none of them."""

    profiles: Mapping[str, KernelFile]
    skipped: tuple[SkippedRow, ...]


def fit_kernels(
    table: Iterable[Mapping[str, object]],
    *,
    accelerators: Sequence[str] | None = None,
    folder: Path | None = None,
    held_out: bool = True,
) -> Calibration:
    """Fit every matmul curve and attention entry that the rows show.

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

    Returns
    -------
    Calibration
        Profile files ready for `write_profiles`.
    """
    folder = folder or kernel_folder()
    matmuls, attentions, skipped = parse_rows(table, folder)
    profiles: dict[str, KernelFile] = {}
    names = sorted({row.accelerator for row in matmuls} | {row.accelerator for row in attentions})
    for name in names if accelerators is None else [name for name in names if name in accelerators]:
        accelerator = load_accelerator(name)
        device = _Device(
            accelerator=accelerator,
            form=load_form(folder),
            profile=load_kernel_profile(name, accelerator.vendor, folder),
            file=_own_file(accelerator, folder),
            held_out=held_out,
            skipped=skipped,
        )
        curves = _fit_curves(device, [row for row in matmuls if row.accelerator == name])
        entries = _fit_entries(device, [row for row in attentions if row.accelerator == name], curves)
        if curves or entries:
            profiles[name] = msgspec.structs.replace(
                device.file,
                matmul={**device.file.matmul, **curves},
                attention={**device.file.attention, **entries},
                fitted_against=_figures(accelerator),
                launch=_launch(device.file, curves),
            )
    return Calibration(profiles=profiles, skipped=tuple(sorted(skipped, key=lambda row: row.index)))


def write_profiles(profiles: Mapping[str, KernelFile], folder: Path) -> list[Path]:
    """Write profile files as YAML, each whole or not at all.

    Parameters
    ----------
    profiles : mapping of str to KernelFile
        Files by name.
    folder : Path
        Folder to write to; it must exist.

    Returns
    -------
    list of Path
        The files written.
    """
    written = []
    for name, profile in profiles.items():
        path = folder / f"{name}.yaml"
        text = _dump(msgspec.to_builtins(profile))
        partial = path.with_suffix(".yaml.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; give a folder that can be") from None
        written.append(path)
    return written


@dataclass(frozen=True, kw_only=True)
class _Device:
    """One accelerator being calibrated: what is known of it, and where skipped rows are noted."""

    accelerator: Accelerator
    form: FormFile
    profile: KernelProfile
    file: KernelFile
    held_out: bool
    skipped: list[SkippedRow]


def _own_file(accelerator: Accelerator, folder: Path) -> KernelFile:
    path = folder / f"{accelerator.name}.yaml"
    if path.is_file():
        return read_kernels(path)
    borrows = load_kernel_profile(accelerator.name, accelerator.vendor, folder).files[0]
    return KernelFile(kind="kernels", name=accelerator.name, borrows=borrows, note="Calibrated from measured rows.")


def _fit_curves(device: _Device, rows: list[MatmulRow]) -> dict[str, MatmulEntry]:
    form, file, name = device.form, device.file, device.accelerator.name
    fitted: dict[str, MatmulEntry] = {}
    # 16-bit precisions stand first in the form: the narrower ones share their memory and launch.
    for precision, format_of in form.precisions.items():
        known = file.matmul.get(precision)
        own = [row for row in rows if row.precision == precision]
        own = _claimed(own, known.libraries if known else [], device.skipped)
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
        own = _claimed(own, known.libraries if known else [], device.skipped)
        what = f"{implementation} {direction} attention"
        if known is not None and known.basis != "measured":
            _skip(device, own, f"{what} of {name} is {known.basis} on purpose")
        elif known is None and len(own) < device.form.fit.few_rows:
            _skip(device, own, f"{name} has no {what}, and {len(own)} rows are too few for it")
        elif own:
            entry = _attention_entry(device, own, known, known_curves[wide].launch)
            fitted[implementation] = msgspec.structs.replace(both, **{direction: entry})
    return fitted


def _skip(device: _Device, rows: Sequence[MatmulRow] | Sequence[AttentionRow], reason: str) -> None:
    device.skipped.extend(SkippedRow(index=row.index, reason=reason) for row in rows)


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

    fitted = fit(kept)
    return msgspec.structs.replace(
        fitted,
        basis="measured",
        source=_sources(kept),
        note=curves[precision].note if precision in curves else "",
        libraries=curves[precision].libraries if precision in curves else _libraries(kept),
        residual=residual(kept, fitted, fit, price, form, "m, n, k >= 1024", device.held_out),
    )


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
        known = msgspec.structs.replace(entries[0], libraries=_libraries(rows), note="")
    start = msgspec.structs.replace(known, launch=launch)

    def fit(chosen: Sequence[AttentionRow]) -> AttentionEntry:
        return fit_attention(chosen, accelerator, form, start, efficiency)

    def price(entry: AttentionEntry, chosen: Sequence[AttentionRow]) -> list[float]:
        model = bind_attention(accelerator, entry, form, backward, efficiency, "bf16")
        bandwidth = accelerator.memory_bandwidth * efficiency
        return [attention_seconds(row, model) + harness_time(row, entry, bandwidth) for row in chosen]

    fitted = fit(rows)
    return msgspec.structs.replace(
        fitted,
        basis="measured",
        source=_sources(rows),
        residual=residual(rows, fitted, fit, price, form, "sequences >= 1024", device.held_out),
    )


def _launch(file: KernelFile, curves: Mapping[str, MatmulEntry]) -> Seconds | None:
    """Launch of small kernels: that of the 16-bit curve, unless the file has one from elsewhere."""
    wide = next((curves[p] for p in ("bf16", "fp16") if p in curves and curves[p].basis == "measured"), None)
    if wide is None or (wide.residual and wide.residual.rows < 2) or (file.launch and file.launch.basis != "derived"):
        return file.launch
    source = "launch of the 16-bit matmul curve of this file"
    return Seconds(value=wide.launch.value, unit=wide.launch.unit, source=source, basis="derived")


def _sources(rows: Sequence[MatmulRow] | Sequence[AttentionRow]) -> str:
    return "; ".join(sorted({row.source for row in rows}))


def _libraries(rows: Sequence[MatmulRow] | Sequence[AttentionRow]) -> list[str]:
    return sorted({row.library for row in rows})


def _figures(accelerator: Accelerator) -> dict[str, Quantity]:
    rates = {name: rate for name, rate in accelerator.peak_flops.items() if name != "int8"}
    return {f"peak_{name}": Quantity(value=rate / 1e12, unit="TFLOP/s") for name, rate in rates.items()} | {
        "memory_bandwidth": Quantity(value=accelerator.memory_bandwidth / 1e9, unit="GB/s"),
        "compute_units": Quantity(value=float(accelerator.compute_units or 1), unit="count"),
    }


def _dump(data: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quantities and other flat mappings of short values on one line."""

    def represent(dumper: Any, mapping: dict[Any, Any]) -> Any:
        mapping = {key: value for key, value in mapping.items() if value is not None}
        flat = all(not isinstance(value, (dict, list)) and len(str(value)) < 24 for value in mapping.values())
        return dumper.represent_mapping("tag:yaml.org,2002:map", mapping, flow_style=flat and len(mapping) < 8)

    def represent_list(dumper: Any, values: list[Any]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)

    def represent_text(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=">" if len(text) > 80 else None)

    Dumper.add_representer(dict, represent)
    Dumper.add_representer(list, represent_list)
    Dumper.add_representer(str, represent_text)
    text: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, width=118, allow_unicode=True)
    return text
