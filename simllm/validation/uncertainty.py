"""How far off predictions were: the error ranges that estimates carry, from validated runs.

``python -m simllm.validation.uncertainty tests/published/training_runs.csv`` writes hardware_profiles/uncertainty.yaml,
which `simllm.training.uncertainty` reads. Step times and peak memory are predicted with run constants fitted without
the run's fold (`simllm.validation.run_fit`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simllm.errors import InputError
from simllm.hardware.profiles import profiles_dir
from simllm.training.uncertainty import MINIMUM_RUNS, ErrorRange, UncertaintyProfile
from simllm.validation.run_constants import QUANTITIES
from simllm.validation.run_fit import RunErrors, RunFit
from simllm.validation.scoring import percentile, typical

__all__ = ["Judged", "error_range", "measure_uncertainty", "write_uncertainty"]

#: Eight of ten runs lie between these percentiles of measured over predicted step time.
_LOW, _HIGH = 0.1, 0.9
_DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One configuration: measured over predicted, the device, and the part it is left out with."""

    ratio: float
    accelerator: str
    part: str


def error_range(ratios: Iterable[float]) -> ErrorRange:
    """The 10th and 90th percentile of measured over predicted, for a further run to lie between.

    A new run is as likely in each of the n + 1 gaps between and beside the known ones (conformal prediction,
    Vovk et al. 2005), so the percentiles of few runs lie further out.

    >>> error_range(i / 10 for i in range(11))
    ErrorRange(low=0.02, high=0.98, runs=11)
    """
    ordered = sorted(ratios)
    if not ordered:
        raise InputError("no run has both a measured and a predicted value")
    n = len(ordered)
    gaps = (((n + 1) * fraction - 1) / max(1, n - 1) for fraction in (_LOW, _HIGH))
    low, high = (round(percentile(ordered, min(1.0, max(0.0, gap))), _DIGITS) for gap in gaps)
    return ErrorRange(low=low, high=high, runs=n)


def measure_uncertainty(times: Sequence[Judged], memory: Sequence[Judged], source: str) -> UncertaintyProfile:
    """Error ranges over all runs, and for every accelerator with enough of them.

    Parameters
    ----------
    times, memory : sequence of Judged
        One for each configuration.
    source : str
        Where the runs come from.
    """
    overall, by_accelerator = _ranges(times)
    return UncertaintyProfile(
        source=source,
        overall=overall,
        by_accelerator=by_accelerator,
        memory=error_range(judged.ratio for judged in memory),
        coverage=_coverage(times, by_device=True),
        memory_coverage=_coverage(memory, by_device=False),
    )


def _ranges(judged: Sequence[Judged]) -> tuple[ErrorRange, dict[str, ErrorRange]]:
    groups: dict[str, list[float]] = {}
    for item in judged:
        groups.setdefault(item.accelerator, []).append(item.ratio)
    found = {name: error_range(ratios) for name, ratios in sorted(groups.items()) if len(ratios) >= MINIMUM_RUNS}
    return error_range(item.ratio for item in judged), found


def _coverage(judged: Sequence[Judged], by_device: bool) -> float:
    """Share of configurations inside the range that the other parts give."""
    inside = total = 0
    for part in {item.part for item in judged}:
        others = [item for item in judged if item.part != part]
        if not others:
            continue
        overall, by_accelerator = _ranges(others)
        for item in judged:
            if item.part == part:
                found = by_accelerator.get(item.accelerator, overall) if by_device else overall
                low, high = found.around(1.0)
                inside += low <= item.ratio <= high
                total += 1
    return round(inside / total, _DIGITS) if total else 0.0


def _judged(errors: RunErrors) -> list[Judged]:
    pairs = zip(errors.rows, errors.parts, strict=True)
    known = [(row, o, part) for row, part in pairs if (o := row.outcome(errors.quantity)) is not None]
    where = {outcome.key: (row.gpu, part) for row, outcome, part in known}
    return [
        Judged(ratio=one.measured / one.predicted, accelerator=where[one.key][0], part=where[one.key][1])
        for one in typical(outcome for _, outcome, _ in known)
    ]


def published_uncertainty(path: str) -> UncertaintyProfile:
    """The error ranges of a table of runs."""
    times, memory = (_judged(RunFit(path, quantity=quantity).errors("fold")) for quantity in QUANTITIES)
    source = f"validation of published training runs ({Path(path).name}), one vote for each configuration"
    return measure_uncertainty(times, memory, source)


def write_uncertainty(profile: UncertaintyProfile, path: Path) -> None:
    """Write a profile as YAML, whole or not at all."""
    lines = [
        "# Measured over predicted, of step time and of peak memory: 10th and 90th percentile over configurations.",
        "# They are predicted with constants fitted to other runs; coverage is the share of runs inside the range",
        "# that others give.",
        "# Written by `python -m simllm.validation.uncertainty`; not edited by hand.",
        f'source: "{profile.source}"',
        f"overall: {_yaml(profile.overall)}",
        "by_accelerator:" if profile.by_accelerator else "by_accelerator: {}",
        *(f"  {gpu}: {_yaml(found)}" for gpu, found in profile.by_accelerator.items()),
        f"memory: {_yaml(profile.memory)}",
        f"coverage: {profile.coverage}",
        f"memory_coverage: {profile.memory_coverage}",
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
        write_uncertainty(published_uncertainty(arguments[0]), target)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
