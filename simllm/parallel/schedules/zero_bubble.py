"""Schedules with the backward pass cut into input and weight gradients (Qi 2023, arXiv:2401.10241).

The gradient of a stage's input is what the stage before waits for; that of its weights can wait and fill gaps.
"""

from __future__ import annotations

from simllm.errors import InputError
from simllm.parallel.schedules.actions import Action, Row
from simllm.parallel.schedules.classic import visiting_order

__all__ = ["interleaved_zero_bubble", "zb_h1", "zb_h2", "zb_v"]


def zb_h1(pp: int, m: int) -> tuple[Row, ...]:
    """1F1B whose weight gradients start as many micro-batches late as the rank's number (section 2.3, figure 2).

    Every rank then holds the pp micro-batches that the first one holds in 1F1B.
    """
    order = [(0, i) for i in range(m)]
    return tuple(_delayed(min(m, pp - rank - 1), rank, order, 1) for rank in range(pp))


def zb_h2(pp: int, m: int) -> tuple[Row, ...]:
    """Twice the warm-up of ZB-H1, which leaves no bubble and holds 2 pp - 1 micro-batches (section 2.3, figure 3)."""
    order = [(0, i) for i in range(m)]
    return tuple(_delayed(min(m, 2 * (pp - rank - 1)), 2 * rank, order, 1) for rank in range(pp))


def interleaved_zero_bubble(pp: int, m: int, vpp: int) -> tuple[Row, ...]:
    """ZB-H1 over several chunks a rank, as torchtitan's InterleavedZeroBubble."""
    order = visiting_order(pp, m, vpp)
    return tuple(_delayed(min(m * vpp, (vpp - 1) * pp + pp - rank - 1), rank, order, vpp) for rank in range(pp))


def _delayed(warm_up: int, delay: int, order: list[tuple[int, int]], vpp: int) -> Row:
    """Warm-up, then forward, input gradient, and the weight gradient of ``delay`` input gradients ago."""
    forwards = [Action("F", chunk, i) for chunk, i in order]
    inputs = [Action("I", vpp - 1 - chunk, i) for chunk, i in order]
    weights = [Action("W", vpp - 1 - chunk, i) for chunk, i in order]
    row = forwards[:warm_up]
    for at, action in enumerate(inputs):
        row += forwards[warm_up + at : warm_up + at + 1]
        row.append(action)
        row += weights[at - delay : at - delay + 1] if at >= delay else []
    return tuple(row + weights[max(0, len(weights) - delay) :])


def zb_v(pp: int, m: int) -> tuple[Row, ...]:
    """Two chunks a rank laid out as a V, so that loss and gradient start on the first rank (section 6).

    No bubble where F, I and W take equally long, with the memory of 1F1B.
    """
    if m < 2 * pp:
        raise InputError(f"zb-v needs at least 2 pp = {2 * pp} micro-batches, but there are {m}")
    return tuple(_v_row(pp, m, rank) for rank in range(pp))


def _v_row(pp: int, m: int, rank: int) -> Row:
    row: list[Action] = []
    count = dict.fromkeys(("F0", "F1", "I0", "I1", "W0", "W1"), 0)

    def run(words: str, times: int = 1) -> None:
        for _ in range(times):
            for word in words.split():
                if word != "F0" or count[word] < m:
                    row.append(Action(word[0], int(word[1]), count[word]))
                count[word] += 1

    run("F0", 2 * (pp - rank) - 1)
    run("F1 F0", rank)
    run("F1 I1 W1", pp - rank)
    run("F0 I0 W0 F1 I1 W1", m - count["F1"])
    run("I0 I1", rank)
    run("I0 W0", pp - rank)
    run("W1", m - count["W1"])
    run("W0", m - count["W0"])
    return tuple(row)
