"""How far off predictions have been: intervals from the errors of published runs, not from a guess.

The errors are data: hardware_profiles/uncertainty.yaml, written by `simllm.validation` from the published runs. For
each accelerator it holds the range of measured over predicted step time that eight of ten runs fall into, each run
predicted with constants that have seen no run of its source.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from simllm.hardware import Accelerator
from simllm.hardware.profiles import load_profile_file, profiles_dir

__all__ = ["ErrorRange", "UncertaintyProfile", "peak_memory_interval", "step_time_interval"]

#: Fewer published runs than this say nothing about the spread of a device; all runs together do then.
MINIMUM_RUNS = 8


class ErrorRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured over predicted step time: the 10th and 90th percentile over so many configurations."""

    low: float
    high: float
    runs: int

    def around(self, value: float) -> tuple[float, float]:
        """The range around a prediction; it holds the prediction itself."""
        return value * min(1.0, self.low), value * max(1.0, self.high)


class UncertaintyProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Errors of step times by accelerator, and of peak memory.

    Attributes
    ----------
    source : str
    overall : ErrorRange
    by_accelerator : dict of str to ErrorRange
    memory : ErrorRange
    coverage, memory_coverage : float
        Share of runs inside intervals that were made from other runs.
    """

    source: str
    overall: ErrorRange
    by_accelerator: dict[str, ErrorRange]
    memory: ErrorRange
    coverage: float
    memory_coverage: float

    def of(self, accelerator: str) -> ErrorRange:
        """Errors of step times on an accelerator: its own where enough runs are known, all otherwise."""
        known = self.by_accelerator.get(accelerator)
        return known if known is not None and known.runs >= MINIMUM_RUNS else self.overall


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
    return _profile().of(accelerator.name).around(step_time_s)


def peak_memory_interval(peak_bytes: float) -> tuple[float, float]:
    """The interval that eight of ten published peaks would fall into.

    Parameters
    ----------
    peak_bytes : float
        Predicted.
    """
    return _profile().memory.around(peak_bytes)
