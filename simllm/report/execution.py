"""Executed plans to read: every quantity predicted and executed, and the matrix of all strategies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from simllm.report.text import heading, notes, paragraph, table
from simllm.units import format_duration
from simllm.validation.execution.compare import Comparison, Quantity
from simllm.validation.execution.matrix import MatrixRow

__all__ = ["comparison_report", "matrix_report"]

#: Characters of an order of pipeline actions that a table shows; the document has all of them.
_ORDER_SHOWN = 20


def comparison_report(comparison: Comparison) -> list[RenderableType]:
    """One execution: its quantities, the named terms in the predictions, the verdict.

    Parameters
    ----------
    comparison : Comparison
    """
    case = comparison.case
    model = f"{case.spec.name}, {case.spec.num_hidden_layers} layers, hidden size {case.spec.hidden_size}"
    plan = f"{case.plan}, {case.plan.precision}, sequences of {case.seq_len}, {case.plan.num_gpus} ranks"
    columns = ("quantity", "rank", "predicted", "executed", "difference", "expected", "")
    rows = [_row(quantity) for quantity in comparison.quantities]
    off = sum(not quantity.ok for quantity in comparison.quantities)
    verdict = "every quantity as expected" if comparison.ok else f"{off} of {len(rows)} quantities off"
    parts: list[RenderableType] = [
        heading("Predicted against executed", model),
        paragraph(plan),
        Text(),
        table(columns, rows, left=("quantity", ""), wrap=("quantity", "predicted", "executed")),
        Text(),
        paragraph(f"Each row is the rank that differs most. Verdict: {verdict}."),
    ]
    if comparison.step_s:
        middle, spread = statistics.median(comparison.step_s), max(comparison.step_s) / min(comparison.step_s) - 1
        parts.append(
            paragraph(f"Step: {format_duration(middle)}, median of {len(comparison.step_s)}, spread {spread:.0%}.")
        )
    reasons = dict.fromkeys(f"{term.quantity}: {term.why}" for term in comparison.terms)
    return [*parts, *notes("Named differences in these predictions", list(reasons))]


def _row(quantity: Quantity) -> tuple[str, ...]:
    expected = f"within {quantity.expected_tolerance:.2g}" if quantity.expected_tolerance else "equal"
    if quantity.expected_tolerance and quantity.unit == "B":
        expected = f"within {quantity.expected_tolerance:.0%}"
    verdict = "ok" if quantity.ok else "OFF"
    return (
        quantity.quantity,
        str(quantity.rank),
        _value(quantity.predicted, quantity),
        _value(quantity.executed, quantity),
        _difference(quantity),
        expected,
        verdict,
    )


def _value(value: float | str, quantity: Quantity) -> str:
    if isinstance(value, str):
        return value if len(value) <= _ORDER_SHOWN else f"{value[:_ORDER_SHOWN]}..."
    if isinstance(value, float) and not value.is_integer() and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{round(value):,}"


def _difference(quantity: Quantity) -> str:
    if quantity.difference == 0:
        return "0"
    if isinstance(quantity.executed, str):
        return "order"
    if quantity.expected_tolerance and quantity.unit == "B":
        return f"{quantity.difference / quantity.executed:+.1%}"
    return f"{quantity.difference:+.3g}" if abs(quantity.difference) < 1 else f"{quantity.difference:+,.0f}"


def matrix_report(rows: Sequence[MatrixRow]) -> list[RenderableType]:
    """All strategies on all kinds of models: how many quantities are as expected.

    Parameters
    ----------
    rows : sequence of MatrixRow
    """
    executed = [row for row in rows if row.status == "executed"]
    fine = [row for row in executed if row.ok]
    models = list(dict.fromkeys(row.model for row in rows))
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    cells = {(row.strategy, row.model): _cell(row) for row in rows}
    lines = [(strategy, *(cells.get((strategy, model), "") for model in models)) for strategy in strategies]
    off = [f"{row.model}, {row.strategy}: {', '.join(row.off)}" for row in executed if not row.ok]
    reasons = dict.fromkeys(f"{row.model}: {row.reason}" for row in rows if row.status != "executed")
    failed = [f"{row.model}, {row.strategy}: {row.reason}" for row in rows if row.status == "failed"]
    return [
        heading("Strategies executed by PyTorch", f"{len(executed)} executed, {len(fine)} as predicted"),
        paragraph(
            "A cell counts the quantities that are as expected, of all that were compared; a dash: PyTorch or the "
            "model cannot do it."
        ),
        Text(),
        table(("strategy", *(model.replace("-", "\n") for model in models)), lines, left=("strategy",)),
        *notes("Off", off),
        *notes("Failed", failed),
        *notes("Not executed", [reason for reason in reasons if reason not in failed]),
    ]


def _cell(row: MatrixRow) -> str:
    if row.status == "refused":
        return "-"
    if row.status == "failed":
        return "failed"
    return f"{row.compared - len(row.off)}/{row.compared}"
