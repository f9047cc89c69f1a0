"""ZB-1p and ZB-2p: zero-bubble schedules made for the times at hand, within a limit of memory.

The published rows of that name come from a search (Qi 2023, arXiv:2401.10241, section 3.1) for the order that wastes
least with the memory of 1F1B (1p) or twice that (2p). Here every rank decides, whenever it becomes free, as that
heuristic does: an input gradient before anything else, then a forward if the memory allows one more micro-batch, and a
weight gradient where there is a gap or where it is needed to make room.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import heappop, heappush

from simllm.parallel.schedules.actions import Action, Row, Table
from simllm.parallel.schedules.simulate import StageTimes, simulated_time
from simllm.parallel.schedules.zero_bubble import zb_h1, zb_h2

__all__ = ["searched_zero_bubble"]


@lru_cache(maxsize=256)
def searched_zero_bubble(
    m: int,
    limit: int,
    pending: float,
    forward_s: tuple[float, ...],
    input_s: tuple[float, ...],
    weight_s: tuple[float, ...],
    lag_s: float = 0.0,
) -> Table:
    """The best of two ways to use gaps, and of the schedule made by hand for this limit.

    A weight gradient fills every gap, or only gaps not known to be shorter than itself.

    Parameters
    ----------
    m : int
        Micro-batches.
    limit : int
        Micro-batches whose activations a rank may hold: pp for ZB-1p, 2 pp for ZB-2p.
    pending : float
        What of a micro-batch's activations stays between its input gradient and its weight gradient.
    forward_s, input_s, weight_s : tuple of float
        Seconds per rank.
    lag_s : float
        Transfer time between ranks.
    """
    times = forward_s, input_s, weight_s
    pp = len(forward_s)
    tried = [_greedy(m, limit, pending, times, lag_s, patience) for patience in (0.0, 1.0)]
    tried.append(zb_h2(pp, m) if limit >= 2 * pp - 1 else zb_h1(pp, m))
    tables = [Table(placement="loop", chunks=1, rows=rows) for rows in tried]
    stages = StageTimes(forward=forward_s, input_gradient=input_s, weight_gradient=weight_s, lag=lag_s)

    return min(tables, key=lambda table: simulated_time(table, stages, synchronised=False))


def _greedy(
    m: int, limit: int, pending: float, times: tuple[Sequence[float], ...], lag_s: float, patience: float
) -> tuple[Row, ...]:
    """One pass in order of time.

    ``patience``: how much of a weight gradient has to fit before something else is known to arrive.
    """
    forward_s, input_s, weight_s = times
    pp = len(forward_s)
    never = float("inf")
    rows: list[list[Action]] = [[] for _ in range(pp)]
    clock, held = [0.0] * pp, [0.0] * pp
    forwards, inputs, weights = [0] * pp, [0] * pp, [0] * pp
    arrived = [[0.0] * m if rank == 0 else [never] * m for rank in range(pp)]  # activations from the rank before
    returned = [[never] * m for _ in range(pp)]  # gradients from the rank after
    queue = [(0.0, rank) for rank in range(pp)]
    queued = [0.0] * pp

    def wake(rank: int, at: float) -> None:
        if at < queued[rank]:
            queued[rank] = at
            heappush(queue, (at, rank))

    while queue:
        now, rank = heappop(queue)
        if now != queued[rank]:
            continue
        queued[rank] = never
        f, i, w = forwards[rank], inputs[rank], weights[rank]
        gradient = returned[rank][i] if i < m else never
        room = held[rank] + 1 <= limit + 1e-9
        activation = arrived[rank][f] if f < m else never
        ready = min(gradient, activation if room else never)
        if gradient <= now:
            rows[rank].append(Action("I", 0, i))
            inputs[rank] += 1
            held[rank] += pending - 1
            clock[rank] = now + input_s[rank]
            if rank:
                returned[rank - 1][i] = clock[rank] + lag_s
                wake(rank - 1, max(clock[rank - 1], clock[rank] + lag_s))
        elif activation <= now and room:
            rows[rank].append(Action("F", 0, f))
            forwards[rank] += 1
            held[rank] += 1
            clock[rank] = now + forward_s[rank]
            if rank == pp - 1:
                returned[rank][f] = clock[rank]
            else:
                arrived[rank + 1][f] = clock[rank] + lag_s
                wake(rank + 1, max(clock[rank + 1], clock[rank] + lag_s))
        elif w < i and (i == m or (activation <= now and not room) or ready - now >= patience * weight_s[rank]):
            rows[rank].append(Action("W", 0, w))
            weights[rank] += 1
            held[rank] -= pending
            clock[rank] = now + weight_s[rank]
        else:
            if ready < never:
                wake(rank, ready)
            continue
        wake(rank, clock[rank])
    return tuple(map(tuple, rows))
