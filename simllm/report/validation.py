"""Predictions beside measurements to read: errors overall and by group, and what could not be modelled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.report.text import heading, paragraph, table
from simllm.validation.collectives import CollectiveReport, CollectiveResult
from simllm.validation.runs import RunResult, ValidationReport

__all__ = ["collective_validation_report", "validation_report"]

_COLLECTIVE_GROUPS = ("regime", "machine", "collective", "gpu", "system")
_GROUPS = ("tier", "gpu", "framework", "stack")
#: Reasons that a table names; the document has every row's.
_REASONS_SHOWN = 12


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
        *_scores("step time", summary, _GROUPS),
        *_scores("peak memory", summary["memory"], _GROUPS[:3]),
        *_unsupported(report.rows),
    ]
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
    return [*parts, *_unsupported(report.rows)]


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


def _unsupported(rows: Sequence[RunResult | CollectiveResult]) -> list[RenderableType]:
    """Reasons with how often they occur; numbers in them differ from row to row and are left out."""
    reasons = Counter(re.sub(r"(?<!\w)\d[\d.,]*(?!\w)", "N", row.reason) for row in rows if row.status == "unsupported")
    if not reasons:
        return []
    shown = [(str(number), reason) for reason, number in reasons.most_common(_REASONS_SHOWN)]
    rest = len(reasons) - len(shown)
    more = [paragraph(f"and {rest} more reasons; --json names each row's")] if rest > 0 else []
    return [
        Text(),
        table(("rows", "unsupported because"), shown, left=("unsupported because",), wrap=("unsupported because",)),
        *more,
    ]
