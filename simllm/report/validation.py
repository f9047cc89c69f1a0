"""Predictions beside measurements to read: errors overall and by group, and what could not be modelled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.report.text import heading, paragraph, table
from simllm.units import format_bytes
from simllm.validation.collectives import CollectiveReport, CollectiveResult
from simllm.validation.kernels import KernelResult
from simllm.validation.run_constants import run_constants, shipped_values
from simllm.validation.runs import PEAK_MEMORY_GROUPS, STEP_TIME_GROUPS, RunResult, ValidationReport
from simllm.validation.scoring import Score

__all__ = [
    "collective_validation_report",
    "constants_dict",
    "constants_report",
    "reason_table",
    "unsupported",
    "validation_report",
]

_COLLECTIVE_GROUPS = ("regime", "machine", "collective", "gpu", "system")
#: Reasons that a table names; the document has every row's.
_REASONS_SHOWN = 12
_WORST_SHOWN = 10


def validation_report(report: ValidationReport) -> list[RenderableType]:
    """The errors to read.

    Parameters
    ----------
    report : ValidationReport
    """
    summary = report.summary
    tiers = " and ".join(summary["headline_tiers"])
    parts: list[RenderableType] = [
        heading(
            "Predicted against measured",
            f"{summary['rows']} rows: {summary['ok']} priced, {summary['unsupported']} unsupported",
        ),
        paragraph(
            "Errors are |predicted - measured| / measured over configurations; repeated rows count once. Rows of a "
            f"tier other than {tiers} count only in the table by tier. Bias above zero: predicted too large. "
            "Rank: Spearman correlation of utilisation, of memory where that is judged."
        ),
        *_scores("step time", summary, STEP_TIME_GROUPS),
        *_scores("peak memory", summary["memory"], PEAK_MEMORY_GROUPS),
        *_cross_validation(report.cross_validation),
        *_ablations(report.ablations),
        *_worst(report),
        *unsupported(report.rows),
    ]
    return parts


#: What predictions have not seen, in words.
_LEFT_OUT = {
    "nothing": "in sample",
    "fold": "8 folds by publication and model",
    "source": "without its source (publication and device)",
    "publication": "without its publication",
}


def _cross_validation(found: Mapping[str, Any]) -> list[RenderableType]:
    """Errors in sample and out of it, side by side."""
    parts: list[RenderableType] = []
    for quantity, errors in found.items():
        what = quantity.replace("_", " ")
        fitted = f"{errors['constants']} run constants fitted to the runs that are not left out"
        parts += [Text(), paragraph(f"{what.capitalize()} with {fitted}:")]
        for tier in errors["nothing"]:
            scores = {words: errors[left_out][tier] for left_out, words in _LEFT_OUT.items()}
            parts += [Text(), _table(f"{what}, tier {tier}", scores)]
    return parts


def _ablations(found: Mapping[str, Mapping[str, Score]]) -> list[RenderableType]:
    """What each effect buys."""
    if not found:
        return []
    scores = {name: by_tier["A and B"].to_dict() for name, by_tier in found.items()}
    return [Text(), _table("step time, tiers A and B", scores)]


def _worst(report: ValidationReport) -> list[RenderableType]:
    """The runs farthest off, with where their predicted time goes."""
    known = [(row, o.predicted / o.measured - 1) for row in report.scored if (o := row.step_time)]
    known.sort(key=lambda pair: -abs(pair[1]))
    seen: set[str] = set()
    rows: list[tuple[str, ...]] = []
    for row, error in known:
        if row.config_key not in seen and len(rows) < _WORST_SHOWN:
            seen.add(row.config_key)
            total = sum(row.predicted_by_cause.values())
            top = sorted(row.predicted_by_cause.items(), key=lambda item: -item[1])[:3]
            goes = ", ".join(f"{cause.replace('_', ' ')} {seconds / total:.0%}" for cause, seconds in top)
            rows.append((row.id, f"{error:+.0%}", row.gpu, row.framework, goes))
    if not rows:
        return []
    columns = ("farthest off", "error", "device", "framework", "predicted time goes to")
    left = ("farthest off", "device", "framework", "predicted time goes to")
    return [Text(), table(columns, rows, left=left, wrap=("framework", "predicted time goes to"))]


def constants_dict(values: Mapping[str, float], written: Sequence[str]) -> dict[str, Any]:
    """Fitted constants as plain data."""
    catalog = run_constants().constants
    shipped = shipped_values()
    return {
        "constants": {
            name: {
                "value": value,
                "in_use": shipped[name],
                "prior": run_constants().prior(name),
                "figures": list(catalog[name].figures),
                "note": catalog[name].note,
            }
            for name, value in values.items()
        },
        "written": list(written),
    }


def constants_report(values: Mapping[str, float], written: Sequence[str]) -> list[RenderableType]:
    """Fitted constants to read, beside what they were drawn to."""
    found = constants_dict(values, written)["constants"]
    rows = [
        (name, f"{one['value']:.3g}", f"{one['in_use']:.3g}", f"{one['prior']:.3g}", one["note"])
        for name, one in found.items()
        if one["figures"]
    ]
    columns = ("constant", "fitted", "in use", "prior", "what it is")
    parts: list[RenderableType] = [table(columns, rows, left=("constant", "what it is"), wrap=("what it is",))]
    if written:
        parts += [Text(), paragraph(f"written: {', '.join(written)}")]
    return parts


def collective_validation_report(report: CollectiveReport) -> list[RenderableType]:
    """The errors of collectives to read.

    Parameters
    ----------
    report : CollectiveReport
    """
    summary = report.summary
    parts: list[RenderableType] = [
        heading(
            "Predicted against measured",
            f"{summary['rows']} rows: {summary['ok']} priced, {summary['unsupported']} unsupported",
        ),
        paragraph(
            "Errors are |predicted - measured| / measured of the time, out of place; every priced row counts once. "
            "Bias above zero: predicted too slow. Rank: Spearman correlation of the time."
        ),
        *_scores("time", summary, _COLLECTIVE_GROUPS),
    ]
    for left_out, scores in report.cross_validation.items():
        if isinstance(scores, Mapping):
            parts += [Text(), _table(f"cross-validated by {left_out}", scores)]
    return [*parts, *_farthest(report), *unsupported(report.rows)]


def _farthest(report: CollectiveReport) -> list[RenderableType]:
    """The points farthest off, and what no prediction could get right."""
    if not report.farthest:
        return []
    parts: list[RenderableType] = []
    if report.noise_floor:
        scores = {name: found.to_dict() for name, found in report.noise_floor.items()}
        parts += [
            Text(),
            paragraph(
                "Points that ask the same question as others, each predicted by the median of what those measured:"
            ),
            Text(),
            _table("runs of one configuration", scores),
        ]
    rows = [
        (
            f"{point.row.system or point.row.gpu}, {point.row.collective} of {point.row.ranks}",
            format_bytes(point.row.size_bytes or 0.0),
            f"{point.error:+.0%}",
            ", ".join(point.seen),
        )
        for point in report.farthest
    ]
    columns = ("farthest off", "size", "error", "what the table shows against it")
    left = ("farthest off", "what the table shows against it")
    return [*parts, Text(), table(columns, rows, left=left, wrap=left)]


def _scores(what: str, summary: Mapping[str, Any], groups: Sequence[str]) -> list[RenderableType]:
    if not summary["overall"]["count"] and not any(summary[group] for group in groups):
        return []
    parts: list[RenderableType] = [Text(), _table(f"{what}, overall", {"all": summary["overall"]})]
    for group in groups:
        if summary[group]:
            parts += [Text(), _table(f"{what} by {group}", summary[group])]
    return parts


def _table(title: str, scores: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            name,
            str(score["count"]),
            _percent(score["mean_absolute_percentage_error"]),
            _percent(score["median_absolute_percentage_error"]),
            _percent(score["p90_absolute_percentage_error"]),
            _percent(score["bias"], sign=True),
            "" if score["spearman"] is None else f"{score['spearman']:.2f}",
        )
        for name, score in scores.items()
    ]
    columns = (title, "count", "mean error", "median", "p90", "bias", "rank")
    return table(columns, rows, left=(title,), wrap=(title,))


def _percent(value: float | None, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.1f}%" if sign else f"{value:.1f}%"


def unsupported(rows: Sequence[RunResult | CollectiveResult | KernelResult]) -> list[RenderableType]:
    """Why rows are unsupported."""
    return reason_table("unsupported because", (row.reason for row in rows if row.status == "unsupported"))


def reason_table(title: str, reasons: Iterable[str]) -> list[RenderableType]:
    """Reasons with how often they occur; numbers in them differ from row to row and are left out."""
    counted = Counter(re.sub(r"(?<!\w)\d[\d.,]*(?!\w)", "N", reason) for reason in reasons)
    if not counted:
        return []
    shown = [(str(number), reason) for reason, number in counted.most_common(_REASONS_SHOWN)]
    rest = len(counted) - len(shown)
    more = [paragraph(f"and {rest} more reasons; --json names each row's")] if rest > 0 else []
    return [Text(), table(("rows", title), shown, left=(title,), wrap=(title,)), *more]
