"""Failures and checkpoints: how long a run of so much work takes on machines that break.

Failures come at random (a Poisson process). Work is saved after every interval; a failure costs what was done since the
last checkpoint and a restart, during which machines break as well. Mean and variance of the elapsed time are exact;
`simulate_runs` plays the same story event by event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from simllm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Recovery", "optimal_interval", "simulate_runs", "young_interval"]

#: With fewer failures than this the elapsed time is too lumpy for a smooth distribution: quantiles are played out.
_FEW_FAILURES = 30
_RUNS, _SEED = 4000, 0
#: exp() of more than this says that nothing is ever finished.
_HOPELESS = 500.0


def young_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Work between checkpoints by Young's first-order rule, sqrt(2 C M) (Young 1974, CACM 17:530).

    >>> young_interval(50.0, 10000.0)
    1000.0
    """
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def optimal_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Work between checkpoints that makes the expected time of a run least.

    The minimum of ``(exp((t + C) / M) - 1) / t`` over t (Daly 2006, FGCS 22:303, equation 13, of which his equation 37
    is a series): the root of ``exp(-(t + C) / M) = 1 - t / M``.

    Parameters
    ----------
    checkpoint_s : float
        Seconds that training stands still for a checkpoint.
    mtbf_s : float
        Mean time between failures of the job.

    Examples
    --------
    >>> round(optimal_interval(50.0, 10000.0)), round(young_interval(50.0, 10000.0))
    (967, 1000)
    """
    cost = checkpoint_s / mtbf_s
    share = 1.0  # t / M; the function is convex and rising here, so Newton's steps come down to the root
    for _ in range(100):
        decay = math.exp(-share - cost)
        step = (share - 1 + decay) / (1 - decay)
        share -= step
        if abs(step) < 1e-14:
            break
    return share * mtbf_s


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A run of so much work on machines that break.

    Attributes
    ----------
    work_s : float
        Seconds of useful work.
    mtbf_s : float
        Mean time between failures of the whole job.
    checkpoint_s : float
        Seconds that training stands still for one checkpoint.
    restart_s : float
        Seconds from a failure until training goes on, if nothing fails meanwhile.
    interval_s : float
        Work between checkpoints; rounded so that a whole number of intervals makes the work.

    Examples
    --------
    16,384 GPUs that break every 3.1 hours, checkpoints of 3 s every 4 minutes, 10 minutes to restart:

    >>> run = Recovery(work_s=50 * 86400, mtbf_s=11135, checkpoint_s=3, restart_s=600, interval_s=250)
    >>> round(run.goodput, 3), round(run.expected_failures)
    (0.926, 419)
    """

    work_s: float
    mtbf_s: float
    checkpoint_s: float
    restart_s: float
    interval_s: float

    def __post_init__(self) -> None:
        if (self.segment_s + self.restart_s) / self.mtbf_s > _HOPELESS:
            raise InputError(
                f"a failure every {self.mtbf_s:.3g} s and {self.segment_s + self.restart_s:.3g} s for a restart, an "
                "interval and a checkpoint: such a run never ends; give a longer MTBF, faster storage or fewer GPUs"
            )

    @property
    def segments(self) -> int:
        """Intervals of work, each with its checkpoint."""
        return max(1, round(self.work_s / self.interval_s))

    @property
    def segment_s(self) -> float:
        """Seconds of one interval and its checkpoint without a failure."""
        return self.work_s / self.segments + self.checkpoint_s

    @property
    def expected_s(self) -> float:
        """Mean elapsed time: ``M exp(R / M) (exp(segment / M) - 1)`` a segment (Daly 2006, equation 13)."""
        mtbf, segment = self.mtbf_s, self.segment_s
        return self.segments * mtbf * math.exp(self.restart_s / mtbf) * math.expm1(segment / mtbf)

    @property
    def variance_s2(self) -> float:
        """Variance of the elapsed time; segments are independent.

        A segment takes its own length, or the time to a failure within it and then that of a restart and the segment
        in one piece. The wait for a piece of length L without a failure has mean ``(e^x - 1) M`` and variance
        ``(e^2x - 2 x e^x - 1) M^2`` with ``x = L / M``.
        """
        segment, piece = self.segment_s / self.mtbf_s, (self.segment_s + self.restart_s) / self.mtbf_s
        whole = math.exp(-segment)
        wait = math.expm1(piece)
        wait_square = math.exp(2 * piece) - 2 * piece * math.exp(piece) - 1 + wait * wait
        # First and second moment of the time to a failure inside the segment, times its probability.
        failure, failure_square = _partial_moment(1, segment), _partial_moment(2, segment)
        mean = whole * segment + failure + (1 - whole) * wait
        square = whole * segment**2 + failure_square + 2 * failure * wait + (1 - whole) * wait_square
        return self.segments * max(0.0, square - mean * mean) * self.mtbf_s**2

    @property
    def expected_failures(self) -> float:
        """Failures while the run lasts, on average."""
        return self.expected_s / self.mtbf_s

    @property
    def goodput(self) -> float:
        """Useful work over the mean elapsed time."""
        return self.work_s / self.expected_s

    def quantiles_s(self, *shares: float) -> tuple[float, ...]:
        """Elapsed time that a share of the runs stays below.

        Of many failures: the time beyond a run without failures is Gamma distributed with the exact mean and variance,
        its quantiles by Wilson and Hilferty (1931, PNAS 17:684). Of few: `simulate_runs`.
        """
        least = self.segments * self.segment_s
        if self.expected_failures < _FEW_FAILURES:
            import numpy as np

            return tuple(float(t) for t in np.quantile(simulate_runs(self, _RUNS, _SEED), shares))
        beyond = self.expected_s - least
        shape = beyond**2 / self.variance_s2
        normal = NormalDist()
        return tuple(
            least + beyond * (1 - 1 / (9 * shape) + normal.inv_cdf(share) / (3 * math.sqrt(shape))) ** 3
            for share in shares
        )


def _partial_moment(order: int, end: float) -> float:
    """Integral of ``t^order exp(-t)`` from 0 to an end, for order 1 or 2."""
    if end < 0.1:  # the closed form would lose all digits
        return math.fsum((-1) ** n * end ** (n + order + 1) / (math.factorial(n) * (n + order + 1)) for n in range(10))
    if order == 1:
        return 1 - math.exp(-end) * (1 + end)
    return 2 - math.exp(-end) * (end * end + 2 * end + 2)


def simulate_runs(run: Recovery, runs: int, seed: int) -> npt.NDArray[np.float64]:
    """Elapsed seconds of runs played out failure by failure.

    Parameters
    ----------
    run : Recovery
    runs : int
        How many to play.
    seed : int
        Of the random numbers: the same seed gives the same runs.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    segment = run.segment_s
    clock, left = np.zeros(runs), np.full(runs, run.segments)
    going = np.arange(runs)
    while going.size:
        until = random.exponential(run.mtbf_s, going.size)
        done = np.minimum(np.floor(until / segment), left[going])
        left[going] -= done.astype(left.dtype)
        finished = left[going] == 0
        clock[going] += np.where(finished, done * segment, until)
        going = going[~finished]
        restarting = going
        while restarting.size:
            until = random.exponential(run.mtbf_s, restarting.size)
            clock[restarting] += np.minimum(until, run.restart_s)
            restarting = restarting[until < run.restart_s]
    return clock
