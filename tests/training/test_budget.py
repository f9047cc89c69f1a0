"""What a run costs: hand-computed money, energy, emissions and checkpoints, and a published run."""

from __future__ import annotations

import pytest

from simllm import Cluster, Model, Plan, Training, estimate
from simllm.errors import InputError
from simllm.training import Estimate
from simllm.training.budget import budget, checkpoint_bytes
from simllm.training.operation import Operation


@pytest.fixture(scope="module")
def answer() -> Estimate:
    plan = Plan(tp=2, dp=8, global_batch_size=64, sequence_parallel=True)
    return estimate(Model.load("llama-3-8b"), Cluster.load("dgx-h100", 16), plan, Training(seq_len=8192))


def test_energy_and_emissions(answer: Estimate) -> None:
    own = Operation(node_power=1.4, pue=1.2, kg_co2e_per_kwh=0.5, usd_per_gpu_hour=2.0)
    run = budget(answer, 10**11, operation=own)
    hours = 1e11 / (64 * 8192) * answer.step_time_s / 3600 * 16
    assert run.ideal.gpu_hours == pytest.approx(hours)
    assert run.watts_per_gpu == pytest.approx(700 * 1.4 * 1.2)
    assert run.ideal.kwh == pytest.approx(hours * 0.7 * 1.4 * 1.2)
    assert run.ideal.kg_co2e == pytest.approx(hours * 0.7 * 1.4 * 1.2 * 0.5)
    assert run.ideal.usd == pytest.approx(hours * 2)
    worse = run.with_failures.cost
    for name in ("time_s", "gpu_hours", "usd", "kwh", "kg_co2e"):
        share = getattr(run.ideal, name) / getattr(worse, name)
        assert share == pytest.approx(run.with_failures.goodput)


def test_what_is_not_known_is_not_stated(answer: Estimate) -> None:
    run = budget(answer, 10**11)
    assert run.ideal.kg_co2e is None
    assert run.price_date == "2026-03"
    assert run.watts_per_gpu == 700 * 1.5
    assert "no PUE" in (run.power_source or "")
    tpu = Cluster.load("tpu-v5e-pod", 16)
    other = estimate(
        answer.model, tpu, Plan(dp=16, zero="3", global_batch_size=16), Training(seq_len=2048, stack="xla")
    )
    without = budget(other, 10**9)
    assert without.ideal.kwh is None
    assert without.power_source is None
    assert without.price_date is None


def test_checkpoint(answer: Estimate) -> None:
    # bf16 parameters, float32 master, two float32 moments; no gradients.
    assert checkpoint_bytes(answer) == pytest.approx(14 * 8_030_261_248)
    run = budget(answer, 10**11, operation=Operation(storage_bandwidth=1e9, restart_s=300, gpu_mtbf_s=16 * 3.6e4))
    failures = run.with_failures
    assert failures.checkpoint_s == pytest.approx(112.4, rel=1e-3)
    assert failures.restart_s == pytest.approx(412.4, rel=1e-3)
    assert failures.job_mtbf_s == 3.6e4
    assert failures.sources == {}
    assert failures.failures == pytest.approx(failures.cost.time_s / 3.6e4)
    low, high = failures.goodput_interval
    assert low < failures.goodput < high
    every = budget(answer, 10**11, operation=Operation(checkpoint_interval_s=60)).with_failures
    assert every.checkpoint_interval_s == 60
    assert every.goodput < budget(answer, 10**11).with_failures.goodput


def test_own_mtbf_narrows_the_interval(answer: Estimate) -> None:
    def width(operation: Operation) -> float:
        low, high = budget(answer, 10**13, operation=operation).with_failures.goodput_interval
        return high - low

    published = budget(answer, 10**13).with_failures.gpu_mtbf_s
    assert width(Operation(gpu_mtbf_s=published)) < 0.6 * width(Operation())


def test_llama_3_405b_took_as_many_gpu_hours() -> None:
    """30.84 million GPU-hours for 15.6 trillion tokens (model card of Llama-3.1), all phases of the run together."""
    plan = Plan(tp=8, pp=16, vpp=4, dp=128, schedule="interleaved", sequence_parallel=True, global_batch_size=2048)
    cluster = Cluster.load("meta-grand-teton", 16384)
    answer = estimate(Model.load("llama-3.1-405b"), cluster, plan, Training(seq_len=8192))
    run = budget(answer, int(15.6e12)).with_failures
    assert run.cost.gpu_hours == pytest.approx(30.84e6, rel=0.15)
    low, high = run.goodput_interval
    assert low < 0.90 < run.goodput < high  # published: higher than 90 %


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("pue", 0.9, "at least 1"),
        ("gpu_mtbf_s", 0.0, "above zero"),
        ("gpu_mtbf_s", float("nan"), "above zero"),
        ("node_power", -1.0, "above zero"),
        ("usd_per_gpu_hour", -1.0, "at least zero"),
        ("storage_bandwidth", float("inf"), "above zero"),
    ],
)
def test_impossible_operation(field: str, value: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Operation(**{field: value})
