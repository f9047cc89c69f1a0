"""A sweep in a few lines: how many cells have which answer, and the first of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from simllm.report.text import heading, table
from simllm.sweeps.answer import ANSWERED, NOTHING_FITS, REFUSED
from simllm.units import format_bytes, format_duration

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["sweep_dict", "sweep_report"]

_SHOWN = 12


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    return {status: int((rows["status"] == status).sum()) for status in (ANSWERED, NOTHING_FITS, REFUSED)}


def sweep_dict(rows: pd.DataFrame, output: str) -> dict[str, Any]:
    """What became of a sweep as plain data."""
    return {"output": output, "cells": len(rows), "by_status": _counts(rows)}


def sweep_report(rows: pd.DataFrame, output: str) -> list[RenderableType]:
    """What became of a sweep to read."""
    counts = ", ".join(f"{number} {status}" for status, number in _counts(rows).items() if number)
    columns = ("model", "cluster", "GPUs", "seq_len", "batch", "plan or reason", "step", "MFU", "memory")
    shown = [_line(row) for row in rows.head(_SHOWN).to_dict("records")]
    more = [Text(f"... {len(rows) - _SHOWN} more")] if len(rows) > _SHOWN else []
    return [
        heading(f"{len(rows)} cells", f"{counts}; written to {output}"),
        Text(),
        table(columns, shown, left=("model", "cluster", "plan or reason"), wrap=("plan or reason",)),
        *more,
    ]


def _line(row: dict[Any, Any]) -> tuple[str, ...]:
    asked = (row["model"], row["cluster"], str(row["gpus"]), str(row["seq_len"]), str(row["global_batch_size"]))
    if row["status"] != ANSWERED:
        return (*asked, f"{row['status']}: {row['reason']}", "", "", "")
    degrees = [f"{name}={row[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "dp") if row[name] > 1]
    plan = " ".join([*degrees, f"zero={row['zero']}", f"mbs={row['micro_batch_size']}", str(row["recompute"])])
    figures = format_duration(row["step_time_s"]), f"{row['mfu']:.1%}", format_bytes(row["peak_memory_bytes"])
    return (*asked, plan, *figures)
