"""Runs on machines that break: closed forms against simulation, rules of the literature, a published run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.training.failures import Recovery, optimal_interval, simulate_runs, young_interval
from simllm.training.operation import published_operation

DAY = 86400.0
#: The 54-day snapshot of Llama 3 on 16,384 GPUs (Grattafiori et al. 2024, section 3.3.4).
LLAMA_MTBF_S = 54 * DAY / 419
# 405,853,388,800 parameters, 14 bytes each (bf16 copy, float32 master, two moments), at 2 TB/s.
LLAMA_CHECKPOINT_S = 405_853_388_800 * 14 / 2e12

RUNS = {
    "many failures": Recovery(work_s=50 * DAY, mtbf_s=11135, checkpoint_s=3, restart_s=600, interval_s=250),
    "a lossy run": Recovery(work_s=3e5, mtbf_s=2000, checkpoint_s=100, restart_s=600, interval_s=560),
    "some failures": Recovery(work_s=40 * DAY, mtbf_s=50000, checkpoint_s=30, restart_s=900, interval_s=1700),
    "long pieces": Recovery(work_s=40 * DAY, mtbf_s=40000, checkpoint_s=30, restart_s=10, interval_s=60000),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_closed_form_is_the_mean_and_spread_of_the_simulation(run: Recovery) -> None:
    played = simulate_runs(run, 10000, seed=7)
    error = math.sqrt(run.variance_s2 / 10000)
    assert abs(played.mean() - run.expected_s) < 4 * error
    assert played.std() == pytest.approx(math.sqrt(run.variance_s2), rel=0.04)
    for share in (0.1, 0.5, 0.9):
        beyond = np.quantile(played, share) - run.work_s
        assert run.quantiles_s(share)[0] - run.work_s == pytest.approx(beyond, rel=0.03)


def test_few_failures_are_played_out() -> None:
    run = Recovery(work_s=10 * DAY, mtbf_s=5 * DAY, checkpoint_s=60, restart_s=1200, interval_s=7200)
    assert run.expected_failures < 3
    low, high = run.quantiles_s(0.05, 0.95)
    # The chance of no failure at all is exp(-2.02): one run in ten takes the least time there is.
    assert low == pytest.approx(run.segments * run.segment_s)
    assert high > run.expected_s > low


def test_without_failures_a_run_takes_its_work_and_its_checkpoints() -> None:
    run = Recovery(work_s=1000.0, mtbf_s=1e15, checkpoint_s=5.0, restart_s=60.0, interval_s=100.0)
    assert run.segments == 10
    assert run.expected_s == pytest.approx(1050.0)
    assert simulate_runs(run, 3, seed=0) == pytest.approx([1050.0] * 3)


def test_one_segment_by_hand() -> None:
    # Half an MTBF of work, no checkpoint, no restart: the wait for half an MTBF in one piece, (sqrt(e) - 1) M.
    run = Recovery(work_s=500.0, mtbf_s=1000.0, checkpoint_s=0.0, restart_s=0.0, interval_s=500.0)
    assert run.expected_s == pytest.approx(1000 * (math.sqrt(math.e) - 1))
    assert run.variance_s2 == pytest.approx(1e6 * (math.e - math.sqrt(math.e) - 1))


@given(st.floats(1e-6, 2.0))
def test_the_interval_is_the_best_one(cost: float) -> None:
    mtbf, best = 1e5, optimal_interval(cost * 1e5, 1e5)

    def expected(interval: float) -> float:
        return math.expm1((interval + cost * mtbf) / mtbf) / interval

    assert expected(best) <= expected(0.97 * best) * (1 + 1e-12)
    assert expected(best) <= expected(1.03 * best) * (1 + 1e-12)
    assert best <= young_interval(cost * mtbf, mtbf)


@given(st.floats(1e-6, 0.25))
def test_the_interval_is_that_of_dalys_series(cost: float) -> None:
    # Daly 2006, equation 37: sqrt(2CM) (1 + sqrt(C/2M)/3 + (C/2M)/9) - C.
    half = cost / 2
    series = math.sqrt(2 * cost) * (1 + math.sqrt(half) / 3 + half / 9) - cost
    assert optimal_interval(cost, 1.0) == pytest.approx(series, rel=5e-3)


@given(st.floats(3e3, 1e6), st.floats(1, 300), st.floats(0, 2000), st.floats(1.05, 3))
def test_worse_machines_do_less(mtbf: float, write: float, restart: float, factor: float) -> None:
    def goodput(mtbf_s: float, checkpoint_s: float, restart_s: float) -> float:
        interval = optimal_interval(checkpoint_s, mtbf_s)
        return Recovery(
            work_s=1e8, mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=restart_s, interval_s=interval
        ).goodput

    base = goodput(mtbf, write, restart)
    assert 0 < base < 1
    assert goodput(mtbf / factor, write, restart) < base
    assert goodput(mtbf, write * factor, restart) < base
    assert goodput(mtbf, write, restart * factor + 1) < base


def test_small_segments_keep_their_digits() -> None:
    # With no restart the variance of a wait is x^3 / 3 to leading order; subtracting numbers near 1 would lose it.
    run = Recovery(work_s=1.0, mtbf_s=1e6, checkpoint_s=0.0, restart_s=0.0, interval_s=1.0)
    assert run.variance_s2 == pytest.approx((1e-6) ** 3 / 3 * 1e12, rel=0.01)


def test_llama_3_on_16k_gpus() -> None:
    """More than 90 % of the time was useful (Grattafiori et al. 2024); 419 interruptions are what the MTBF is from."""
    interval = optimal_interval(LLAMA_CHECKPOINT_S, LLAMA_MTBF_S)
    restart = published_operation().restart.si + LLAMA_CHECKPOINT_S
    goodput = 0.926  # closes the loop: so much work fills 54 days
    run = Recovery(
        work_s=54 * DAY * goodput,
        mtbf_s=LLAMA_MTBF_S,
        checkpoint_s=LLAMA_CHECKPOINT_S,
        restart_s=restart,
        interval_s=interval,
    )
    assert run.expected_s == pytest.approx(54 * DAY, rel=1e-3)
    assert run.expected_failures == pytest.approx(419, rel=1e-3)
    assert 0.90 < run.goodput < 0.95
    slowest = run.quantiles_s(0.9)[0]
    assert run.work_s / slowest > 0.90
    assert published_operation().gpu_mtbf.si == pytest.approx(16384 * LLAMA_MTBF_S, rel=1e-3)


def test_a_run_that_never_ends_is_refused() -> None:
    with pytest.raises(InputError, match="never ends"):
        Recovery(work_s=1e6, mtbf_s=1.0, checkpoint_s=600.0, restart_s=600.0, interval_s=10.0)
