"""Kernel timings: reading a table of them and pricing the same kernel.

The columns are those of ``tests/published/kernels.csv``: ``gpu, op, direction, m, n, k, b, s, h, h_kv, d, causal,
dtype, time_us, tflops, library, notes``; rows with ``op`` ``stream`` also use ``operator, bytes, kernels``. A row that
cannot be priced is returned with the reason, never dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from simllm.errors import InputError
from simllm.hardware.accelerator import load_accelerator
from simllm.hardware.profiles import find_profile
from simllm.kernels.device import Kernels
from simllm.kernels.profile import kernel_folder, known_kernel_profiles, load_form
from simllm.kernels.rows import AttentionRow, MatmulRow, Rows, SkippedRow, StreamRow
from simllm.kernels.schema import AttentionEntry, MatmulEntry, read_kernels

__all__ = ["harness_time", "parse_rows", "predict"]

_PRECISIONS = {"f8_r": "fp8", "f8": "fp8", "bf16_r": "bf16", "f16": "fp16", "fp4": "nvfp4"}


@lru_cache(maxsize=8)
def _names(folder: Path) -> dict[str, str]:
    return {
        printed: name
        for name in known_kernel_profiles(folder)
        for printed in (name, *read_kernels(folder / f"{name}.yaml").measured_as)
    }


def parse_rows(
    table: Iterable[Mapping[str, object]], folder: Path | None = None, accelerator: str | None = None
) -> Rows:
    """Rows of a table of kernel timings, by kind, and those that say too little.

    Parameters
    ----------
    table : iterable of mapping
        Rows by column name, as ``csv.DictReader`` gives them. Missing cells are empty, ``nan`` or absent.
    folder : Path, optional
        Folder of kernel files, for what tables call a device and an implementation.
    accelerator : str, optional
        The device that all rows were timed on, whatever their ``gpu`` says.
    """
    folder = folder or kernel_folder()
    matmuls: list[MatmulRow] = []
    attentions: list[AttentionRow] = []
    streams: list[StreamRow] = []
    skipped: list[SkippedRow] = []
    for index, cells in enumerate(table):
        try:
            row = _parse(index, cells, folder, accelerator)
        except InputError as error:
            skipped.append(SkippedRow(index=index, reason=str(error)))
        else:
            if isinstance(row, MatmulRow):
                matmuls.append(row)
            elif isinstance(row, AttentionRow):
                attentions.append(row)
            else:
                streams.append(row)
    return Rows(matmuls, attentions, streams, skipped)


@lru_cache(maxsize=256)
def _kernels(accelerator: str, burst: bool) -> Kernels:
    return Kernels(load_accelerator(accelerator), burst=burst)


def predict(row: MatmulRow | AttentionRow | StreamRow, kernels: Kernels | None = None) -> float:
    """Seconds the model gives to a row, priced as its benchmark ran it.

    Matmuls in 8 and 4 bits include the quantisation by separate kernels where the row's library runs them; attention
    rows of inference libraries include their key-value cache write.

    Parameters
    ----------
    row : MatmulRow, AttentionRow or StreamRow
        The row.
    kernels : Kernels, optional
        What prices it; if left out, the shipped profile of its accelerator, at burst or sustained clocks as the row
        was timed.
    """
    if isinstance(row, StreamRow):
        kernels = kernels or _kernels(row.accelerator, True)
        return row.kernels * kernels.memory_bound(row.size_bytes / row.kernels, row.kind)
    kernels = kernels or _kernels(row.accelerator, not row.sustained)
    if isinstance(row, MatmulRow):
        seconds = kernels.matmul(row.m, row.n, row.k, row.precision, row.count, row.quantise)
        return seconds + harness_time(row, kernels.matmul_entry(row.precision), kernels.accelerator.memory_bandwidth)
    unfused = row.implementation == "unfused"
    seconds = kernels.attention(
        row.batch,
        row.heads,
        row.kv_heads,
        row.seq_len,
        row.seq_len,
        row.head_dim,
        row.v_head_dim,
        row.work_fraction,
        row.implementation,
        row.direction,
        row.precision,
        _eager_bytes(row) if unfused else None,
    )
    if unfused:
        return seconds
    entries = kernels.profile.attention[row.implementation]
    entry = entries.forward if row.direction == "forward" else entries.backward
    return seconds + harness_time(row, entry, kernels.accelerator.memory_bandwidth * kernels.profile.memory_efficiency)


def _eager_bytes(row: AttentionRow) -> float:
    """Traffic per score of attention written as single operators, as tables time it beside fused kernels."""
    form = load_form().unfused
    if row.direction == "backward":
        return form.eager_bytes_backward.si("bytes")
    return form.eager_bytes_forward.si("bytes") + (row.work_fraction < 1) * form.eager_bytes_mask.si("bytes")


def harness_time(row: MatmulRow | AttentionRow, entry: MatmulEntry | AttentionEntry | None, bandwidth: float) -> float:
    """Seconds a row's benchmark adds to the kernel: its own fixed cost, and keys and values copied to a cache."""
    fixed = entry.harness.si("time") if row.harness and entry is not None and entry.harness is not None else 0.0
    if isinstance(row, AttentionRow) and row.kv_cache:  # Read once more and written, 16 bits each.
        fixed += 4.0 * row.batch * row.seq_len * row.kv_heads * (row.head_dim + row.v_head_dim) / bandwidth
    return fixed


def _parse(
    index: int, cells: Mapping[str, object], folder: Path, accelerator: str | None
) -> MatmulRow | AttentionRow | StreamRow:
    op = _text(cells, "op")
    accelerator = accelerator or _accelerator(_text(cells, "gpu"), folder)
    library, source, notes = _text(cells, "library") or "unstated", _text(cells, "source"), _text(cells, "notes")
    form = load_form(folder)
    harness = library.startswith(tuple(form.harness_libraries))
    sustained = library.startswith(tuple(form.sustained_libraries))
    if op.startswith("gemm"):
        precision = _precision(_text(cells, "dtype"), folder)
        m, n, k = (_whole(cells, name) for name in ("m", "n", "k"))
        count = _whole(cells, "b", 1)
        quantised = form.precisions[precision].cast is not None
        return MatmulRow(
            index=index,
            accelerator=accelerator,
            precision=precision,
            m=m,
            n=n,
            k=k,
            count=count,
            time_s=_seconds(cells, 2.0 * m * n * k * count),
            library=library,
            source=source,
            harness=harness,
            sustained=sustained,
            quantise="dynamic" if quantised and library.startswith(tuple(form.quantising_libraries)) else "none",
        )
    if op == "stream":
        operator = _text(cells, "operator")
        if not operator:
            raise InputError("operator is not stated; op=stream needs the kind of kernel")
        return StreamRow(
            index=index,
            accelerator=accelerator,
            kind=f"{operator} {_text(cells, 'direction')}".strip(),
            size_bytes=_whole(cells, "bytes"),
            kernels=_whole(cells, "kernels", 1),
            time_s=_seconds(cells, 0.0),
            library=library,
            source=source,
        )
    if op not in ("attention", "sdp_fwd", "sdp_bwd"):
        raise InputError(f"op={op or 'empty'} is not modelled; use gemm, attention, sdp_fwd, sdp_bwd or stream")
    if _text(cells, "dtype") not in ("bf16", "fp16", "fp32"):
        raise InputError(
            f"dtype={_text(cells, 'dtype') or 'empty'} for attention is not modelled; use bf16, fp16 or fp32"
        )
    direction = {"fwd": "forward", "bwd": "backward"}.get(_text(cells, "direction"))
    if direction is None:
        raise InputError(f"direction={_text(cells, 'direction') or 'empty'} is not known; use fwd or bwd")
    batch, seq_len, heads, head_dim = (_whole(cells, name) for name in ("b", "s", "h", "d"))
    kv_heads = _whole(cells, "h_kv", heads)
    value = re.search(r"v_head_dim=(\d+)", notes)
    v_head_dim = int(value[1]) if value else head_dim
    # SimuMax counts the full square of its causal kernels; all other tables count what the mask keeps.
    causal = op != "attention" or _text(cells, "causal").casefold() == "true"
    counted = 1.0 if op != "attention" or not causal else 0.5
    flops = 2.0 * batch * seq_len**2 * heads * (head_dim + v_head_dim) * counted
    return AttentionRow(
        index=index,
        accelerator=accelerator,
        implementation=_implementation(accelerator, library, direction, folder),
        direction=direction,
        precision=_text(cells, "dtype"),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seq_len=seq_len,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        work_fraction=0.5 if causal else 1.0,
        time_s=_seconds(cells, flops * (form.attention.backward_work if direction == "backward" else 1.0)),
        library=library,
        source=source,
        kv_cache="KV-cache write" in notes,
        harness=harness,
        sustained=sustained,
    )


def _accelerator(printed: str, folder: Path) -> str:
    if printed in _names(folder):
        return _names(folder)[printed]
    try:
        return find_profile("accelerators", printed, "accelerator").stem
    except InputError as error:
        raise InputError(f"gpu={printed or 'empty'}: {error}") from None


def _implementation(accelerator: str, library: str, direction: str, folder: Path) -> str:
    """Which attention a library's rows time on a device: as its file says, else as libraries are usually called."""
    path = folder / f"{accelerator}.yaml"
    if path.is_file():
        for name, entries in read_kernels(path).attention.items():
            entry = entries.forward if direction == "forward" else entries.backward
            if entry is not None and any(library.startswith(prefix) for prefix in entry.libraries):
                return name
    for name, prefixes in load_form(folder).libraries.items():
        if any(library.startswith(prefix) for prefix in prefixes):
            return name
    raise InputError(f"library={library}: no attention implementation on {accelerator} goes by this name")


def _precision(printed: str, folder: Path) -> str:
    precision = _PRECISIONS.get(printed, printed)
    if precision not in load_form(folder).precisions:
        raise InputError(f"dtype={printed or 'empty'} is not modelled; use {', '.join(load_form(folder).precisions)}")
    return precision


def _text(cells: Mapping[str, object], name: str) -> str:
    text = str(cells.get(name) if cells.get(name) is not None else "").strip()
    return "" if text.casefold() == "nan" else text


def _number(cells: Mapping[str, object], name: str) -> float | None:
    text = _text(cells, name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name}={text} is not a number") from None
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{name}={text} must be a number above zero")
    return value


def _whole(cells: Mapping[str, object], name: str, otherwise: int | None = None) -> int:
    value = _number(cells, name)
    if value is None:
        if otherwise is None:
            raise InputError(f"{name} is not stated")
        return otherwise
    if value != int(value):
        raise InputError(f"{name}={value} must be a whole number")
    return int(value)


def _seconds(cells: Mapping[str, object], flops: float) -> float:
    microseconds = _number(cells, "time_us")
    if microseconds is not None:
        return microseconds * 1e-6
    tflops = _number(cells, "tflops")
    if tflops is None or not flops:
        raise InputError("neither time_us nor tflops is stated")
    return flops / (tflops * 1e12)
