"""``simllm validate``: predictions held against measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from simllm.cli.options import Json, Output
from simllm.cli.output import check_output, emit, progress

__all__ = ["COMMANDS", "runs"]


def runs(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Table of training runs (CSV).")],
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Predict every training run of a table and print the errors.

    No row is dropped: what a row does not say is assumed by a stated rule, and one that cannot be modelled is listed
    with its reason.

    \b
    Example:
      simllm validate runs tests/published/training_runs.csv
    """
    from simllm.report.validation import validation_report
    from simllm.validation.runs import validate_runs

    check_output(output)
    with progress("runs predicted") as tick:
        report = validate_runs(file, progress=tick)
    emit(report.to_dict, lambda: validation_report(report), as_json, output)


COMMANDS: dict[str, Callable[..., Any]] = {"runs": runs}
