"""Schedules whose backward pass is one piece: GPipe, 1F1B, interleaved 1F1B, looped breadth-first."""

from __future__ import annotations

from simllm.errors import InputError
from simllm.parallel.schedules.actions import Action, Row

__all__ = ["gpipe", "interleaved", "interleaved_warm_up", "looped_bfs", "one_f_one_b", "visiting_order"]


def gpipe(pp: int, m: int) -> tuple[Row, ...]:
    """All forwards, then all backwards (arXiv:1811.06965)."""
    return ((*(Action("F", 0, i) for i in range(m)), *(Action("B", 0, i) for i in range(m))),) * pp


def one_f_one_b(pp: int, m: int) -> tuple[Row, ...]:
    """Warm-up, then one forward, one backward (PipeDream-flush, arXiv:2006.09503)."""
    order = [(0, i) for i in range(m)]
    return tuple(_alternating(min(m, pp - rank - 1), order, 1) for rank in range(pp))


def interleaved(pp: int, m: int, vpp: int) -> tuple[Row, ...]:
    """1F1B over several chunks a rank (arXiv:2104.04473, section 2.2)."""
    order = visiting_order(pp, m, vpp)
    return tuple(_alternating(interleaved_warm_up(pp, m, vpp, rank), order, vpp) for rank in range(pp))


def looped_bfs(pp: int, m: int, vpp: int) -> tuple[Row, ...]:
    """Every micro-batch through a chunk before the next chunk starts (breadth-first, arXiv:2211.05953).

    The backward pass visits everything in the opposite order.
    """
    forwards = [Action("F", chunk, i) for chunk in range(vpp) for i in range(m)]
    backwards = [action._replace(kind="B") for action in reversed(forwards)]
    return ((*forwards, *backwards),) * pp


def visiting_order(pp: int, m: int, vpp: int) -> list[tuple[int, int]]:
    """Chunk and micro-batch of every forward: micro-batches go round the chunks in groups of pp."""
    if m % pp:
        raise InputError(f"interleaving needs pp={pp} to divide the {m} micro-batches")
    return [(chunk, group + i) for group in range(0, m, pp) for chunk in range(vpp) for i in range(pp)]


def interleaved_warm_up(pp: int, m: int, vpp: int, rank: int) -> int:
    """Forwards before the first backward of the interleaved schedule, in Megatron-Core's and PyTorch's order.

    Megatron-LM until 2024 ran all forwards first where there is one group of micro-batches only.
    """
    return min(m * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp)


def _alternating(warm_up: int, order: list[tuple[int, int]], vpp: int) -> Row:
    forwards = [Action("F", chunk, i) for chunk, i in order]
    backwards = [Action("B", vpp - 1 - chunk, i) for chunk, i in order]
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += [forward, backward]
    return tuple(row + backwards[len(forwards) - warm_up :])
