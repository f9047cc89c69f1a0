"""How far off predictions were: the error ranges that estimates carry, from validated runs.

``python -m simllm.validation.uncertainty tests/published/training_runs.csv`` writes hardware_profiles/uncertainty.yaml,
which `simllm.training.uncertainty` reads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from simllm.errors import InputError
from simllm.hardware.profiles import profiles_dir
from simllm.training.uncertainty import MINIMUM_RUNS, ErrorRange, UncertaintyProfile
from simllm.validation.runs import ValidationReport, validate_runs
from simllm.validation.scoring import Outcome, percentile, typical

__all__ = ["error_range", "measure_uncertainty", "write_uncertainty"]

#: Eight of ten runs lie between these percentiles of measured over predicted step time.
_LOW, _HIGH = 0.1, 0.9
_DIGITS = 3


def error_range(outcomes: Iterable[Outcome]) -> ErrorRange:
    """The 10th and 90th percentile of measured over predicted, one vote for each configuration.

    >>> runs = [Outcome(key=str(i), predicted=10.0, measured=float(i)) for i in range(11)]
    >>> error_range(runs)
    ErrorRange(low=0.1, high=0.9, runs=11)
    """
    ratios = sorted(outcome.measured / outcome.predicted for outcome in typical(outcomes))
    if not ratios:
        raise InputError("no run has both a measured and a predicted step time")
    low, high = (round(percentile(ratios, fraction), _DIGITS) for fraction in (_LOW, _HIGH))
    return ErrorRange(low=low, high=high, runs=len(ratios))


def measure_uncertainty(report: ValidationReport, source: str) -> UncertaintyProfile:
    """Error ranges over all scored runs, and for every accelerator with enough of them.

    Parameters
    ----------
    report : ValidationReport
    source : str
        Where the runs come from.
    """
    groups: dict[str, list[Outcome]] = {}
    for row in report.scored:
        outcome = row.step_time
        if outcome is not None:
            groups.setdefault(row.gpu, []).append(outcome)
    ranges = {gpu: error_range(outcomes) for gpu, outcomes in sorted(groups.items())}
    return UncertaintyProfile(
        source=source,
        overall=error_range(outcome for outcomes in groups.values() for outcome in outcomes),
        by_accelerator={gpu: found for gpu, found in ranges.items() if found.runs >= MINIMUM_RUNS},
    )


def write_uncertainty(profile: UncertaintyProfile, path: Path) -> None:
    """Write a profile as YAML, whole or not at all."""
    lines = [
        "# Measured over predicted step time of validated runs: 10th and 90th percentile over configurations.",
        "# Written by `python -m simllm.validation.uncertainty`; not edited by hand.",
        f'source: "{profile.source}"',
        f"overall: {_yaml(profile.overall)}",
        "by_accelerator:" if profile.by_accelerator else "by_accelerator: {}",
        *(f"  {gpu}: {_yaml(found)}" for gpu, found in profile.by_accelerator.items()),
    ]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def _yaml(found: ErrorRange) -> str:
    return f"{{low: {found.low}, high: {found.high}, runs: {found.runs}}}"


def main(arguments: list[str]) -> int:
    """Write the error ranges of a table of runs; returns the exit status."""
    if len(arguments) not in (1, 2):
        sys.stderr.write("usage: python -m simllm.validation.uncertainty RUNS.csv [OUT.yaml]\n")
        return 2
    target = Path(arguments[1]) if len(arguments) == 2 else profiles_dir() / "uncertainty.yaml"
    try:
        source = f"validation of published training runs ({Path(arguments[0]).name}), one vote for each configuration"
        write_uncertainty(measure_uncertainty(validate_runs(arguments[0]), source), target)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
