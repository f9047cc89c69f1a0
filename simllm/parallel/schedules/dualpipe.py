"""DualPipe and DualPipeV: forward and backward chunks side by side, so that one hides the communication of the other.

DualPipe (DeepSeek-V3, arXiv:2412.19437, section 3.2.1) sends micro-batches through two copies of the model from both
ends of the pipeline. Cut at the middle and folded, half of it is DualPipeV: two chunks a rank laid out as a V.
"""

from __future__ import annotations

from simllm.errors import InputError
from simllm.parallel.schedules.actions import Action, Pair, Row

__all__ = ["dualpipe", "dualpipe_v"]


def dualpipe_v(pp: int, m: int) -> tuple[Row, ...]:
    """The folded half of DualPipe."""
    if m < 2 * pp:
        raise InputError(f"dualpipe-v needs at least 2 pp = {2 * pp} micro-batches, but there are {m}")
    return tuple(_row(pp, rank, m, (0, 1), (0, 0)) for rank in range(pp))


def dualpipe(pp: int, m: int) -> tuple[Row, ...]:
    """Both directions; the second half of the micro-batches goes up the ranks with chunk 1."""
    if pp % 2 or m % 2 or m < 2 * pp:
        raise InputError(
            f"dualpipe needs an even pp and an even number of at least 2 pp micro-batches; got pp={pp} and {m}"
        )
    half = pp // 2
    down = [_row(half, rank, m // 2, (0, 1), (0, m // 2)) for rank in range(half)]
    up = [_row(half, rank, m // 2, (1, 0), (m // 2, 0)) for rank in reversed(range(half))]
    return (*down, *up)


def _row(ranks: int, rank: int, m: int, chunk: tuple[int, int], first: tuple[int, int]) -> Row:
    """One rank's work: ``chunk`` and ``first`` micro-batch of what comes in (0) and of what goes back (1)."""
    row: list[Action | Pair] = []
    waiting: list[Action] = []
    forward, backward = [0, 0], [0, 0]
    after = ranks - rank - 1

    def run(kind: str, side: int) -> Action:
        count = forward if kind == "F" else backward
        action = Action(kind, chunk[side], first[side] + count[side])
        count[side] += 1
        if kind == "I":
            waiting.append(action)
        return action

    def weights() -> None:
        done = waiting.pop(0)
        row.append(Action("W", done.chunk, done.micro_batch))

    row += [run("F", 0) for _ in range(2 * after)]
    for _ in range(rank + 1):
        row += [run("F", 0), run("F", 1)]
    for _ in range(after):
        row.append(run("I", 1))
        weights()
        row.append(run("F", 1))
    for at in range(m - 2 * ranks + rank + 1):
        pair = Pair(run("F", 0), run("B", 1))
        # On the rank at the turn the first backward waits for the forward just before it.
        row += pair if at == 0 and after == 0 else (pair,)
        row.append(Pair(run("F", 1), run("B", 0)))
    for _ in range(after):
        row.append(run("B", 1))
        row.append(Pair(run("F", 1), run("B", 0)))
    row += [run("B" if at <= rank else "I", 1 - at % 2) for at in range(2 * (rank + 1))]
    for _ in range(after):
        weights()
        row.append(run("I", 0))
    for _ in range(rank + 1):
        weights()
    return tuple(row)
