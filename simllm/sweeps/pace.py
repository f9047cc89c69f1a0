"""How fast a sweep goes and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable

from simllm.units import format_duration, format_si

__all__ = ["Pace"]


class Pace:
    """Rate and remaining time from what was done since the start.

    Examples
    --------
    >>> now = iter([0.0, 4.0])
    >>> Pace(clock=lambda: next(now)).line(10, 26, 2)
    '10 of 26 cells, 2 a second, 8 s left'
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()

    def line(self, done: int, total: int, before: int) -> str:
        """Progress in one line.

        Parameters
        ----------
        done, total : int
            Cells that are done, and all.
        before : int
            Of those done, how many an earlier run did.
        """
        elapsed = self._clock() - self._start
        text = f"{done} of {total} cells"
        if done <= before or elapsed <= 0:
            return text
        rate = (done - before) / elapsed
        return f"{text}, {format_si(rate)} a second, {format_duration((total - done) / rate)} left"
