"""How far off predictions have been: intervals from the errors of published runs, not from a guess.

The errors are data: hardware_profiles/uncertainty.yaml, written by `simllm.validation` from the published runs. For
each accelerator it holds the range of measured over predicted step time that eight of ten runs fall into.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from simllm.hardware import Accelerator
from simllm.hardware.profiles import load_profile_file, profiles_dir

__all__ = ["ErrorRange", "UncertaintyProfile", "step_time_interval"]

#: Fewer published runs than this say nothing about the spread of a device; all runs together do then.
MINIMUM_RUNS = 8


class ErrorRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured over predicted step time: the 10th and 90th percentile over so many configurations."""

    low: float
    high: float
    runs: int


class UncertaintyProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Errors of step times by accelerator."""

    source: str
    overall: ErrorRange
    by_accelerator: dict[str, ErrorRange]


@lru_cache(maxsize=1)
def _profile() -> UncertaintyProfile:
    return load_profile_file(profiles_dir() / "uncertainty.yaml", UncertaintyProfile)


def step_time_interval(step_time_s: float, accelerator: Accelerator) -> tuple[float, float]:
    """The interval that eight of ten published runs would fall into.

    Parameters
    ----------
    step_time_s : float
        Predicted.
    accelerator : Accelerator
        Its own runs decide where there are enough, all published runs otherwise.
    """
    profile = _profile()
    known = profile.by_accelerator.get(accelerator.name)
    errors = known if known is not None and known.runs >= MINIMUM_RUNS else profile.overall
    return step_time_s * min(1.0, errors.low), step_time_s * max(1.0, errors.high)
