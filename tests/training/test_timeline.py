"""The timeline of a step: it ends when the estimate says, nothing overlaps, nothing is missing, order is kept."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from simllm import Cluster, Model, Plan, Training, estimate
from simllm.errors import InputError
from simllm.training import Estimate
from simllm.training.timeline import step_timeline

PLANS: dict[str, dict[str, Any]] = {
    "1f1b": {"pp": 4, "dp": 4},
    "gpipe": {"pp": 4, "dp": 4, "schedule": "gpipe"},
    "interleaved": {"pp": 4, "dp": 4, "vpp": 4, "schedule": "interleaved"},
    "no pipeline": {"dp": 16},
    "fully sharded": {"dp": 16, "zero": "3"},
}


@pytest.fixture(params=PLANS, ids=PLANS)
def answer(request: pytest.FixtureRequest) -> Estimate:
    plan = Plan(**PLANS[request.param], global_batch_size=64)
    return estimate(Model.load("llama-3-8b"), Cluster.load("dgx-h100", 16), plan, Training(seq_len=4096))


def test_timeline(answer: Estimate) -> None:
    plan, line = answer.plan, step_timeline(answer)
    assert len(line.ranks) == plan.pp
    ends: dict[tuple[str, int, int], tuple[float, float]] = {}
    for rank, slices in enumerate(line.ranks):
        for before, after in pairwise(slices):
            assert before.end_s <= after.start_s + 1e-9
        actions = [item for item in slices if item.kind in "FB"]
        wanted = {(kind, c, i) for kind in "FB" for c in range(plan.vpp) for i in range(plan.num_micro_batches)}
        assert {(a.kind, a.chunk, a.micro_batch) for a in actions} == wanted
        assert len(actions) == len(wanted)
        for a in actions:
            assert a.end_s - a.start_s == pytest.approx(sum(line.parts[rank][a.kind, a.chunk].values()))
            ends[a.kind, a.chunk * plan.pp + rank, a.micro_batch] = (a.start_s, a.end_s)
    last = plan.pp * plan.vpp - 1
    for (kind, chunk, i), (start, _) in ends.items():
        if kind == "F" and chunk:
            assert start >= ends["F", chunk - 1, i][1] - 1e-9
        if kind == "B":
            after = ("F", chunk, i) if chunk == last else ("B", chunk + 1, i)
            assert start >= ends[after][1] - 1e-9
    exact = estimate(answer.model, answer.cluster, plan, answer.training, simulate=True)
    assert line.total_s == pytest.approx(exact.step_time_s, rel=1e-9)
    # The last rank has the head to run, which the closed form spreads over its chunks.
    assert line.total_s == pytest.approx(answer.step_time_s, rel=0.03)


@pytest.mark.parametrize(
    ("schedule", "vpp", "kinds"),
    [("zb-h1", 1, {"F", "B", "I", "W"}), ("dualpipe", 1, {"F", "B", "I", "W", "FB"})],
)
def test_split_and_paired_actions(schedule: str, vpp: int, kinds: set[str]) -> None:
    plan = Plan(pp=4, dp=4, vpp=vpp, global_batch_size=64, schedule=schedule)
    answer = estimate(Model.load("llama-3-8b"), Cluster.load("dgx-h100", 16), plan, Training(seq_len=4096))
    line = step_timeline(answer)
    for slices in line.ranks:
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(slices))
        assert {item.kind for item in slices} - {"data_parallel", "gradient_clipping", "optimizer"} <= kinds
        weights = [s for s in slices if s.kind in ("B", "W")]
        weights += [s for s in slices if s.kind == "FB"]
        assert len({(s.chunk, s.micro_batch, s.beside) for s in weights}) == len(weights)
    # Ranks of a zero-bubble schedule begin their next step while others finish this one; a timeline shows one step.
    if answer.plan.pipeline.synchronised:
        assert line.total_s == pytest.approx(answer.step_time_s, rel=1e-6)
    else:
        assert answer.step_time_s * (1 - 1e-9) <= line.total_s < 1.1 * answer.step_time_s


def test_too_many_actions_are_refused() -> None:
    plan = Plan(pp=2, dp=1, global_batch_size=600_000)
    answer = estimate(Model.load("gpt2"), Cluster.load("dgx-h100", 2), plan, Training(seq_len=1024))
    with pytest.raises(InputError, match="2,400,000 actions"):
        step_timeline(answer)
