"""What would help, what binds and what is worth a choice: against changed questions asked by hand, and conservation."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simllm import Cluster, Model, Plan, Recompute, Training, estimate, plan
from simllm.errors import InputError
from simllm.planner.binding import resources
from simllm.planner.pareto import pareto_front
from simllm.planner.reasons import difference, explain_difference
from simllm.planner.sensitivity import sensitivity
from simllm.training import Estimate

MODEL, CLUSTER, TRAINING = Model.load("llama-3-8b"), Cluster.load("dgx-h100", 16), Training(seq_len=8192)
SPLITS: dict[str, dict[str, Any]] = {
    "tensor": {"tp": 8, "dp": 2, "sequence_parallel": True},
    "pipeline": {"tp": 2, "pp": 4, "vpp": 2, "dp": 2, "schedule": "interleaved", "sequence_parallel": True},
    "sharded": {"dp": 16, "zero": "3"},
    "replicas": {"dp": 16, "zero": "0"},
    "recomputed": {"dp": 16, "recompute": Recompute(kind="full")},
}


def answer_of(name: str, cluster: Cluster = CLUSTER, training: Training = TRAINING, batch: int = 64) -> Estimate:
    return estimate(MODEL, cluster, Plan(**SPLITS[name], global_batch_size=batch), training)


@pytest.mark.parametrize("name", SPLITS)
def test_resources_add_up(name: str) -> None:
    answer = answer_of(name)
    found = resources(answer)
    assert sum(found.values()) == pytest.approx(answer.step_time_s, rel=1e-12)
    causes = answer.time.by_cause
    assert found["compute"] == pytest.approx(causes["matmul"] + causes["attention"])
    assert found.get("compute, again", 0.0) == causes["recompute"]
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_links_that_bind() -> None:
    assert "nvlink4" in resources(answer_of("tensor"))
    sharded = resources(answer_of("sharded"))
    assert sharded["infiniband"] == pytest.approx(answer_of("sharded").time.by_cause["data_parallel"])


def test_every_change_is_the_changed_question() -> None:
    base = answer_of("tensor")
    changes = {change.what: change for change in sensitivity(base, factor=1.2)}
    card = CLUSTER.accelerator
    rates = {key: 1.2 * value for key, value in card.peak_flops.items()}
    by_hand = {
        "FLOP rate": replace(CLUSTER, accelerator=replace(card, peak_flops=rates)),
        "memory bandwidth": replace(CLUSTER, accelerator=replace(card, memory_bandwidth=1.2 * card.memory_bandwidth)),
        "memory": replace(CLUSTER, accelerator=replace(card, memory_bytes=96 * 2**30)),
        "nvlink4 bandwidth": replace(CLUSTER, scaleup_bandwidth=540e9),
        "infiniband bandwidth": replace(CLUSTER, scaleout_bandwidth_per_node=480e9),
    }
    for what, cluster in by_hand.items():
        again = changes[what].same_plan
        assert again is not None
        assert again.step_time_s == pytest.approx(answer_of("tensor", cluster).step_time_s, rel=1e-12), what
        assert changes[what].gain(again) == pytest.approx(base.step_time_s / again.step_time_s - 1)
    assert changes["memory"].elasticity == 0
    assert changes["memory"].same_plan.usable_memory_bytes == pytest.approx(1.2 * base.usable_memory_bytes)  # type: ignore[union-attr]
    batch = changes["batch"]
    assert (batch.before, batch.after) == ("64 sequences", "78 sequences")
    assert batch.same_plan.step_time_s == pytest.approx(answer_of("tensor", batch=78).step_time_s)  # type: ignore[union-attr]
    longer = changes["sequence"]
    assert (longer.after, longer.factor) == ("9856 tokens", 9856 / 8192)


@pytest.mark.parametrize("name", SPLITS)
def test_no_resource_binds_more_than_the_whole_step(name: str) -> None:
    changes = {change.what: change.elasticity for change in sensitivity(answer_of(name))}
    hardware = [changes[what] for what in changes if what not in ("batch", "sequence")]
    assert all(share is not None and -1e-9 <= share <= 1 for share in hardware)
    assert sum(share or 0 for share in hardware) <= 1 + 1e-9
    found = resources(answer_of(name))
    bound = (found["compute"] + found.get("compute, again", 0.0)) / answer_of(name).step_time_s
    # Bubble and small products apart, what counts as compute is what faster matrix units would speed up.
    assert changes["FLOP rate"] == pytest.approx(bound, abs=0.12)


def test_interleaved_batches_grow_by_groups_of_micro_batches() -> None:
    # 52.8 sequences at least: 2 replicas x 4 ranks make groups of 8, without the groups 54 would do.
    batch = next(c for c in sensitivity(answer_of("pipeline", batch=48)) if c.what == "batch")
    assert batch.after == "56 sequences"
    assert batch.reason is None


def test_second_search() -> None:
    node = Cluster.load("dgx-h100", 8)
    base = plan(MODEL, node, TRAINING, global_batch_size=64, top=1).plans[0]
    asked = []

    def best(cluster: Cluster, training: Training, batch: int) -> Estimate | None:
        asked.append((cluster, training.seq_len, batch))
        return plan(MODEL, cluster, training, global_batch_size=batch, top=1).plans[0] if batch == 64 else None

    changes = sensitivity(base, search=best)
    assert len(asked) == len(changes) == 6
    for change in changes:
        if change.what == "batch":
            assert change.best is None
        elif change.same_plan is not None and change.same_plan.fits:
            assert change.best is not None
            assert change.gain(change.best) >= change.gain(change.same_plan) - 1e-12


@pytest.mark.parametrize("factor", [1.0, 0.5, math.nan, math.inf])
def test_factor_must_be_more(factor: float) -> None:
    with pytest.raises(InputError, match="above 1"):
        sensitivity(answer_of("tensor"), factor=factor)


def test_difference_adds_up() -> None:
    best, other = answer_of("tensor"), answer_of("pipeline")
    assert sum(difference(best, other).values()) == pytest.approx(other.step_time_s - best.step_time_s)
    smaller = estimate(
        MODEL, Cluster.load("dgx-h100", 8), Plan(tp=8, global_batch_size=64, sequence_parallel=True), TRAINING
    )
    gpu_time = sum(difference(best, smaller).values())
    assert gpu_time == pytest.approx(smaller.step_time_s / 2 - best.step_time_s)
    assert f"{gpu_time / best.step_time_s:+.1%} GPU time" in explain_difference(best, smaller)


def fake(time: float, gpus: int, memory: float, fits: bool = True) -> Estimate:
    """What a front looks at: a step of 10^9 tokens that takes so many days on so many GPUs."""
    card = SimpleNamespace(memory_bytes=1.0, price_usd_per_hour=None, name="card")
    answer = SimpleNamespace(
        step_time_s=time * 86400,
        tokens_per_step=10**9,
        tokens_per_s_per_gpu=1e9 / (time * 86400) / gpus,
        plan=SimpleNamespace(num_gpus=gpus),
        peak_memory_bytes=memory,
        cluster=SimpleNamespace(accelerator=card),
        fits=fits,
    )
    return cast("Estimate", answer)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), max_size=30))
def test_front_by_brute_force(values: list[tuple[int, int, int]]) -> None:
    answers = [fake(*value) for value in values]
    front = {
        (a.step_time_s / 86400, a.plan.num_gpus, a.peak_memory_bytes)
        for a in pareto_front(answers, ("time", "gpus", "memory"))
    }
    wanted = {
        value
        for value in values
        if not any(other != value and all(a <= b for a, b in zip(other, value, strict=True)) for other in values)
    }
    assert front == wanted


def test_front_leaves_out_what_does_not_fit_and_needs_prices() -> None:
    assert pareto_front([fake(1, 1, 1, fits=False)]) == ()
    with pytest.raises(InputError, match="no price is known"):
        pareto_front([fake(1, 1, 1)], ("cost",))
    with pytest.raises(InputError, match="speed"):
        pareto_front([fake(1, 1, 1)], ("speed",))
    with pytest.raises(InputError, match="no objectives"):
        pareto_front([fake(1, 1, 1)], ())
