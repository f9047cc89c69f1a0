"""What each effect buys: the errors of predictions without it, nothing fitted again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from simllm.validation.run_constants import Constants, run_constants, shipped_values
from simllm.validation.runs import RunResult, ValidationReport, validate_runs
from simllm.validation.scoring import Score, score

__all__ = ["ablations"]

_TIERS = {"A": ("A",), "B": ("B",), "A and B": ("A", "B", "")}
#: Values that switch a constant off, by the first word of its name: full clocks, the kernel as measured, nothing shown
#: of overlapped communication, no host, each token moved once.
_OFF = {"sustained": 1.0, "attention": 1.0, "exposed": 0.0, "tensor": 1.0, "expert": 1.0, "host": 0.0, "moe": 1.0}


def ablations(
    path: str | Path, report: ValidationReport, progress: Callable[[int, int], None] | None = None
) -> dict[str, Mapping[str, Score]]:
    """Errors by tier with everything, without each cause of time, and with groups of constants switched off.

    Parameters
    ----------
    path : str or Path
        The table that the report is of.
    report : ValidationReport
    progress : callable, optional
        Called with the effects done and their number.
    """
    found: dict[str, Mapping[str, Score]] = {"everything": _scores(report.rows)}
    causes = sorted({cause for row in report.rows for cause in row.predicted_by_cause})
    for cause in causes:
        found[f"without {cause.replace('_', ' ')}"] = _scores(_without(row, cause) for row in report.rows)
    shipped = shipped_values()
    for number, (word, off) in enumerate(_OFF.items(), 1):
        catalog = run_constants().constants
        names = [name for name in catalog if name.split("_")[0] == word and catalog[name].figures]
        values = shipped | dict.fromkeys(names, off)
        found[f"{word} constants at {off:g}"] = _scores(validate_runs(path, constants=Constants(values)).rows)
        if progress is not None:
            progress(number, len(_OFF))
    return found


def _without(row: RunResult, cause: str) -> RunResult:
    if row.predicted_step_time_s is None:
        return row
    seconds = row.predicted_step_time_s - row.predicted_by_cause.get(cause, 0.0)
    return replace(row, predicted_step_time_s=seconds)


def _scores(rows: Iterable[RunResult]) -> dict[str, Score]:
    known = [(row.tier, outcome) for row in rows if (outcome := row.step_time) is not None]
    return {name: score(outcome for tier, outcome in known if tier in tiers) for name, tiers in _TIERS.items()}
