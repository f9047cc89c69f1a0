"""The action tables against those of torch.distributed.pipelining."""

from __future__ import annotations

import re
from typing import Any

import pytest

from simllm.parallel.schedules import Action, Pair, schedule_actions, stage_of

visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")


def words(action: Any) -> list[str]:
    """An action of torch as stage, kind and micro-batch; a pair as both with & between; nothing for an idle slot."""
    if action is None:
        return []
    if action.sub_actions:
        return ["&".join(word for sub in action.sub_actions for word in words(sub))]
    found = re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action))
    return [f"{found[1]}{found[2]}{found[3]}"] if found else []  # the rest is the reduction of gradients


@pytest.mark.parametrize(
    ("theirs", "ours", "vpp"),
    [
        ("GPipe", "gpipe", 1),
        ("1F1B", "1f1b", 1),
        ("Interleaved1F1B", "interleaved", 2),
        ("Interleaved1F1B", "interleaved", 3),
        ("LoopedBFS", "looped-bfs", 2),
        ("InterleavedZeroBubble", "interleaved-zb", 2),
        ("InterleavedZeroBubble", "interleaved-zb", 3),
        ("ZBVZeroBubble", "zb-v", 2),
        ("DualPipeV", "dualpipe-v", 2),
    ],
)
@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 16), (8, 24), (4, 4)])
def test_tables_equal_pytorchs(theirs: str, ours: str, vpp: int, pp: int, m: int) -> None:
    if theirs in ("ZBVZeroBubble", "DualPipeV") and m < 2 * pp:
        pytest.skip("a V needs twice as many micro-batches as ranks")
    expected = visualizer.get_schedule_ops(theirs, pp, m, vpp)
    table = schedule_actions(ours, pp, m, vpp)

    def word(rank: int, action: Action) -> str:
        return f"{stage_of(table.placement, pp, rank, action.chunk)}{action.kind}{action.micro_batch}"

    for rank in range(pp):
        if theirs == "1F1B" and rank == pp - 1:
            continue  # PyTorch's table of the last rank is shifted by one micro-batch; what it runs is not
        row = [
            "&".join(word(rank, part) for part in item) if isinstance(item, Pair) else word(rank, item)
            for item in table.rows[rank]
        ]
        assert row == [w for action in expected[rank] for w in words(action)]
