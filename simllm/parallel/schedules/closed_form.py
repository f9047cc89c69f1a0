"""Closed forms: the length of a pipeline and what its ranks hold, without running a table."""

from __future__ import annotations

from collections.abc import Sequence

from simllm.elementwise import Real
from simllm.errors import unknown_name
from simllm.parallel.schedules.classic import interleaved_warm_up

__all__ = ["in_flight_chunks", "pipeline_bubble", "pipeline_time", "zero_bubble_time"]


def pipeline_time(stage_s: Sequence[float], num_micro_batches: int, vpp: int = 1) -> float:
    """Closed form of 1F1B, GPipe, the interleaved and the looped breadth-first schedule.

    The slowest rank works without a gap; filling and draining the pipeline takes one micro-batch through all other
    ranks, or 1/vpp of that when every rank holds vpp chunks (arXiv:2104.04473, section 2.2.2:
    bubble / ideal = (p - 1) / (v m)). Exact for GPipe and wherever stages are equal. With uneven stages it is an upper
    bound of 1F1B and of the interleaved schedule: a slow rank starts working off its micro-batches during the warm-up.
    The looped breadth-first schedule needs at least as many micro-batches as ranks.

    Parameters
    ----------
    stage_s : sequence of float
        Forward plus backward seconds of one micro-batch on each rank, all of its chunks together.
    num_micro_batches, vpp : int

    Examples
    --------
    >>> pipeline_time([3.0] * 4, 8), pipeline_time([3.0] * 4, 8, vpp=2)
    (33.0, 28.5)
    """
    slowest = max(stage_s)
    return num_micro_batches * slowest + pipeline_bubble(slowest, sum(stage_s), vpp)


def pipeline_bubble(slowest_s: Real, all_s: Real, vpp: int = 1) -> Real:
    """Seconds that the slowest rank waits while the pipeline fills and drains (see `pipeline_time`).

    Parameters
    ----------
    slowest_s, all_s : float or array
        One micro-batch on the slowest rank, and on all ranks one after the other.
    vpp : int
    """
    return (all_s - slowest_s) / vpp


def in_flight_chunks(schedule: str, pp: int, num_micro_batches: int, rank: int, vpp: int = 1) -> int:
    """Most (chunk, micro-batch) pairs whose activations a rank holds at once.

    GPipe and looped breadth-first: all of them. 1F1B: ``pp - rank``. Interleaved: its warm-up and one more.

    >>> [in_flight_chunks("1f1b", 4, 8, rank) for rank in range(4)]
    [4, 3, 2, 1]
    >>> [in_flight_chunks("interleaved", 4, 8, rank, 2) for rank in range(4)]
    [11, 9, 7, 5]
    """
    m = num_micro_batches
    if schedule in ("gpipe", "looped-bfs"):
        return m * vpp
    if schedule == "1f1b":
        return min(m, pp - rank)
    if schedule == "interleaved":
        return min(m * vpp, interleaved_warm_up(pp, m, vpp, rank) + 1)
    raise unknown_name("schedule with a closed form", schedule, ["gpipe", "1f1b", "interleaved", "looped-bfs"])


def zero_bubble_time(
    schedule: str, pp: int, num_micro_batches: int, forward_s: float, input_s: float, weight_s: float, vpp: int = 1
) -> float:
    """Closed form of zero-bubble schedules with equal stages, from the first action to the last.

    ZB-H1, also interleaved: (p - 1) (T_F + T_B - T_W) idle, ZB-H2: (p - 1) (T_F + T_B - 2 T_W) (arXiv:2401.10241,
    table 2, T_B the input gradient) where weight gradients are short. Otherwise what the last rank waits for, a forward
    on all others, or the first one, the first gradient after its warm-up.

    Parameters
    ----------
    schedule : {"zb-h1", "zb-h2", "interleaved-zb"}
    pp, num_micro_batches : int
    forward_s, input_s, weight_s : float
        Seconds of one chunk.
    vpp : int

    Examples
    --------
    >>> zero_bubble_time("zb-h1", 4, 12, 1.0, 1.0, 1.0), zero_bubble_time("zb-h2", 4, 12, 1.0, 1.5, 0.75)
    (39.0, 42.0)
    """
    if schedule == "zb-h2":
        idle = (pp - 1) * max(forward_s, input_s - forward_s, forward_s + input_s - 2 * weight_s)
    else:
        idle = (pp - 1) * max(forward_s, input_s, forward_s + input_s - weight_s)
    return num_micro_batches * vpp * (forward_s + input_s + weight_s) + idle
