"""Timed training steps beside predictions, to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from simllm.report.text import heading, paragraph, table
from simllm.units import format_bytes, format_duration
from simllm.validation.measure.device import TorchDevice

__all__ = ["skipped_report", "steps_dict", "steps_report"]


def steps_dict(device: TorchDevice, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain data with stable keys, SI units."""
    return {
        "device": device.name,
        "library": device.library,
        "quantities": [dict(row) for row in rows],
        "ok": all(row["ok"] for row in rows),
    }


def skipped_report(reason: str) -> list[RenderableType]:
    """What is said where nothing could be timed."""
    return [heading("Skipped", reason), paragraph("Nothing was timed, so nothing holds.")]


def steps_report(device: TorchDevice, rows: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """One line for each case and quantity, with its verdict.

    Parameters
    ----------
    device : TorchDevice
    rows : sequence of mapping
        As `simllm.validation.step_timing.StepComparison.rows` gives them.
    """
    columns = ("case", "quantity", "predicted", "executed", "difference", "tolerance", "spread", "verdict")
    cells = []
    for row in rows:
        show = format_bytes if row["quantity"].startswith("peak memory") else format_duration
        cells.append(
            (
                row["case"],
                row["quantity"],
                show(row["predicted"]),
                show(row["executed"]),
                f"{row['difference']:+.1%}",
                f"{row['expected_tolerance']:.0%}",
                f"{row['spread']:.0%}",
                {True: "holds", False: "off", None: "not judged"}[row["ok"]],
            )
        )
    skipped = sum(row["ok"] is None for row in rows)
    words = "Spread: of the middle half of the steps. "
    if skipped:
        words += f"{skipped} not judged, because steps lay further apart than 15 %; that is no pass."
    return [
        heading(device.name, device.library),
        paragraph(words),
        table(columns, cells, left=("case", "quantity", "verdict"), wrap=("case", "quantity")),
    ]
