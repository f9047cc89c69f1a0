"""A fitted link class as a profile in YAML."""

from __future__ import annotations

import json

import msgspec

from simllm.hardware.figures import Figure
from simllm.validation.link_fit import FittedSweep, LinkFit, error_summary

__all__ = ["link_yaml"]


def link_yaml(fit: LinkFit) -> str:
    """A fitted link class as a profile, with what the fit leaves over as comments."""
    lines = [
        f"# {fit.link.name} as fitted by `simllm calibrate collectives`. Errors of the fitted times, median and p90:",
        *(f"# {_summary(found)}" for found in fit.sweeps),
    ]
    for name in fit.link.__struct_fields__:
        value = getattr(fit.link, name)
        if isinstance(value, msgspec.Struct):
            lines += _part_yaml(name, value, "")
        elif isinstance(value, tuple):
            lines += [f"{name}: [{', '.join(map(json.dumps, value))}]"] if value else []
        elif isinstance(value, bool):
            lines += [f"{name}: true"] if value else []
        elif value is not None:
            lines.append(f"{name}: {json.dumps(value) if name == 'description' else value}")
    return "\n".join(lines) + "\n"


def _summary(found: FittedSweep) -> str:
    errors = error_summary(found.errors)
    sweep = found.sweep
    return (
        f"{sweep.operation} of {sweep.group.size} ranks, {len(found.fitted_s)} sizes: "
        f"{errors['median_absolute_percentage_error']:.1f} % and {errors['p90_absolute_percentage_error']:.1f} %"
    )


def _part_yaml(name: str, part: msgspec.Struct | str, indent: str) -> list[str]:
    """A figure or text on one line, or a part with its own figures and parts below it."""
    if isinstance(part, Figure):
        return [f"{indent}{name}: {_figure_yaml(part)}"]
    if isinstance(part, str):
        return [f"{indent}{name}: {json.dumps(part)}"]
    lines = [f"{indent}{name}:"]
    for key in part.__struct_fields__:
        value = getattr(part, key)
        if value is not None:
            lines += _part_yaml(key, value, indent + "  ")
    return lines


def _figure_yaml(figure: Figure) -> str:
    cells = {"value": figure.value, "unit": figure.unit, "basis": figure.basis, "source": json.dumps(figure.source)}
    if figure.note:
        cells["note"] = json.dumps(figure.note)
    return "{" + ", ".join(f"{name}: {value}" for name, value in cells.items()) + "}"
