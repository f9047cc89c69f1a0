"""Hardware profiles as tables and as plain data: every figure with its unit, its source and what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from simllm.hardware import Accelerator, Figure
from simllm.hardware.figures import DollarsPerHour
from simllm.hardware.profiles import figures_of
from simllm.hardware.system import SystemProfile
from simllm.report.text import facts, heading, notes, paragraph, table
from simllm.units import format_bytes, format_rate

__all__ = ["catalog_dict", "catalog_report", "check_report", "profile_dict", "profile_report"]


def _figure_dict(figure: Figure) -> dict[str, Any]:
    dated = {"date": figure.date} if isinstance(figure, DollarsPerHour) else {}
    return {key: getattr(figure, key) for key in ("value", "unit", "source", "basis", "note")} | dated


def catalog_dict(
    accelerators: Sequence[Accelerator], systems: Sequence[SystemProfile], names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The catalog as plain data.

    Parameters
    ----------
    accelerators : sequence of Accelerator
    systems : sequence of SystemProfile
    names : mapping of str to sequence of str
        Names of the profiles of the other kinds.
    """
    return {
        "systems": [
            {
                "name": system.name,
                "aliases": list(system.aliases),
                "accelerator": system.accelerator,
                "figures": {key: _figure_dict(figure) for key, figure in figures_of(system).items()},
            }
            for system in systems
        ],
        "accelerators": [
            {
                "name": card.name,
                "aliases": list(card.aliases),
                "vendor": card.vendor,
                "figures": {key: _figure_dict(figure) for key, figure in card.figures.items()},
            }
            for card in accelerators
        ],
        **{kind: list(known) for kind, known in names.items()},
    }


def catalog_report(
    accelerators: Sequence[Accelerator], systems: Sequence[SystemProfile], names: Mapping[str, Sequence[str]]
) -> list[RenderableType]:
    """The catalog to read: clusters, accelerators, and the names of what they are made of."""
    parts: list[RenderableType] = []
    if systems:
        columns = ("cluster", "accelerator", "GPUs/node", "domain", "link", "in domain", "per node")
        rows = [
            (
                system.name,
                system.accelerator,
                str(system.node.gpus.value),
                str(system.scaleup.domain_gpus.value),
                system.scaleup.link,
                format_rate(system.scaleup.bandwidth.si),
                format_rate(system.scaleout.bandwidth.si) if system.scaleout else "",
            )
            for system in systems
        ]
        parts += [
            table(columns, rows, left=("cluster", "accelerator", "link")),
            paragraph("in domain: of one GPU; per node: of one node into the network; each way."),
        ]
    if accelerators:
        columns = ("accelerator", "vendor", "memory", "bandwidth", "bf16", "fp8", "USD/h")
        rows = [
            (
                card.name,
                card.vendor,
                format_bytes(card.memory_bytes),
                format_rate(card.memory_bandwidth),
                _tflops(card.peak_flops.get("bf16", card.peak_flops.get("fp16"))),
                _tflops(card.peak_flops.get("fp8")),
                f"{card.price_usd_per_hour:.2f}" if card.price_usd_per_hour else "",
            )
            for card in accelerators
        ]
        parts += [
            *([Text()] if parts else []),
            table(columns, rows, left=("accelerator", "vendor")),
            paragraph("bf16 (fp16 where there is none), fp8: dense peak in TFLOP/s; USD/h: list price of one device."),
        ]
    if names:
        parts += [*([Text()] if parts else []), facts({kind: ", ".join(known) for kind, known in names.items()})]
    return parts


def _tflops(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.4g}"


def _figures(data: Mapping[str, Any], prefix: str = "", source: str = "", basis: str = "") -> Iterator[dict[str, Any]]:
    """Every figure of a profile by its key path; one without a source of its own has that of its curve."""
    source, basis = data.get("source", source), data.get("basis", basis)
    for key, item in data.items():
        if not isinstance(item, Mapping):
            continue
        path = f"{prefix}{key}"
        if "value" in item and "unit" in item:
            own = {"source": item.get("source", source), "basis": item.get("basis", basis), "note": item.get("note")}
            if own["source"]:
                yield {"key": path, "value": item["value"], "unit": item["unit"], **own}
        elif key == "rate" and item:
            # A table of a kernel profile: share of the peak by head size.
            for step, value in item.items():
                yield {"key": f"{path}.{step}", "value": value, "unit": "fraction", "source": source, "basis": basis}
        else:
            yield from _figures(item, f"{path}.", source, basis)


def _words(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """What a profile says in words, by key path."""
    for key, item in data.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping):
            if "value" not in item and key not in ("rate", "residual"):
                yield from _words(item, f"{path}.")
        elif isinstance(item, list):
            yield path, ", ".join(str(word) for word in item)
        elif key not in ("name", "kind", "source", "basis", "note") and not (prefix and key == "notes"):
            yield path, str(item)


def profile_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    """One profile as plain data: ``figures`` by key path, the words beside them.

    Parameters
    ----------
    data : mapping
        Content of the profile's file.
    """
    figures = {figure["key"]: {k: v for k, v in figure.items() if k != "key"} for figure in _figures(data)}
    return {"name": data["name"], "kind": data["kind"], "properties": dict(_words(data)), "figures": figures}


def profile_report(data: Mapping[str, Any]) -> list[RenderableType]:
    """One profile to read: its figures, and below them the numbered sources."""
    profile = profile_dict(data)
    sources: dict[str, int] = {}
    rows = []
    for key, figure in profile["figures"].items():
        number = sources.setdefault(figure["source"], len(sources) + 1)
        rows.append(
            (key, f"{figure['value']:g}", figure["unit"], figure["basis"], f"[{number}]", figure.get("note") or "")
        )
    columns = ("figure", "value", "unit", "basis", "source", "note")
    parts: list[RenderableType] = [
        heading(profile["name"], profile["kind"]),
        Text(),
        facts(profile["properties"]),
        Text(),
        table(columns, rows, left=("figure", "unit", "basis", "source", "note"), wrap=("note",)),
    ]
    if sources:
        parts += [Text(), heading("Sources"), facts({f"[{n}]": source for source, n in sources.items()})]
    return parts


def check_report(path: str, problems: Sequence[str]) -> list[RenderableType]:
    """What is wrong with a profile, or that nothing is."""
    if not problems:
        return [paragraph(f"{path}: ok")]
    return notes(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)[1:]
