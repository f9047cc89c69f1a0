"""The pipeline of a step, event by event, against the composition of its parts."""

from __future__ import annotations

import pytest

from simllm import Cluster, Model, Plan, Training
from simllm.parallel.schedules import SCHEDULES
from simllm.training.step import Step, StepTime


def step(schedule: str, model: str = "llama-3-8b", gpus: int = 8, pp: int = 4, **more: int) -> Step:
    vpp = SCHEDULES[schedule].chunks or 2
    plan = Plan(pp=pp, vpp=vpp, dp=gpus // pp, schedule=schedule, global_batch_size=16 * gpus // pp, **more)
    return Step(Model.load(model), Cluster.load("dgx-h100", gpus), plan, Training(seq_len=4096))


def once_per_step(of: Step, time: StepTime) -> float:
    """Seconds of a step that no micro-batch takes: optimizer, clipping and what shows of data-parallel traffic."""
    return time.by_cause["optimizer"] + time.by_cause["gradient_clipping"] + time.by_cause["data_parallel"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_busy_ranks_of_the_timeline_are_the_causes(schedule: str) -> None:
    one = step(schedule)
    time = one.time(simulate=True)
    timeline = one.pipeline_run.timeline()
    working = time.total_s - time.by_cause["pipeline_bubble"] - once_per_step(one, time)
    assert timeline.busy_s[time.busiest_stage] == pytest.approx(working, rel=1e-9)
    assert max(timeline.busy_s) == pytest.approx(working, rel=1e-9)
    if SCHEDULES[schedule].synchronised:
        assert timeline.total_s == pytest.approx(time.total_s - once_per_step(one, time), rel=1e-9)


def test_weight_gradients_are_about_a_third() -> None:
    run = step("zb-h1").pipeline_run
    inner = slice(1, 3)
    for forward, inputs, weights in zip(
        run.times.forward[inner], run.times.input_gradient[inner], run.times.weight_gradient[inner], strict=True
    ):
        # As many products as the forward and the input gradient have, but no attention and no elementwise kernels.
        assert 0.25 < weights / (forward + inputs + weights) < 1 / 3


def test_pairs_hide_the_exchanges_of_experts() -> None:
    apart, beside = (step(name, "mixtral-8x7b", 32, 4, ep=8).time() for name in ("zb-v", "dualpipe-v"))
    assert 0 < beside.by_cause["expert_parallel"] < 0.6 * apart.by_cause["expert_parallel"]
    assert beside.by_cause["matmul"] == pytest.approx(apart.by_cause["matmul"])


def test_two_copies_exchange_their_gradients() -> None:
    one, two = step("1f1b"), step("dualpipe")
    roles = {exchange.role for exchange in two.reductions(1000, 0)}
    assert roles == {"dp", "dp_replicas"}
    assert {exchange.role for exchange in one.reductions(1000, 0)} == {"dp"}
