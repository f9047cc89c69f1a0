"""Imbalance and capacity of experts: by hand, against simulated routers, and what must hold for all of them."""

from __future__ import annotations

from math import ceil, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.models.graph import Axis, Layout
from simllm.models.routing import Routing, capacity, expert_load, random_imbalance

IMBALANCES = st.one_of(st.just("random"), st.floats(1, 8))
FACTORS = st.one_of(st.none(), st.floats(0.25, 4))
SHAPES = st.sampled_from([(8, 2), (16, 4), (64, 6), (128, 8), (256, 8), (16, 1)])


def simulated(tokens: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    """Rows of every expert when each token chooses at random, without taking one twice."""
    scores = np.random.default_rng(seed).random((tokens, experts))
    chosen = np.argpartition(scores, top_k, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=experts)


def test_random_imbalance_of_two_ranks_by_hand() -> None:
    # 100 tokens choose 2 of 4 experts on 2 ranks: 100 rows each, variance 100 (4 - 2) / (4 - 1).
    largest = NormalDist().inv_cdf((2 - 0.375) / (2 - 0.75 + 1))
    assert random_imbalance(100, 4, 2, 2) == pytest.approx(1 + largest * sqrt(100 * 2 / 3) / 100)
    assert random_imbalance(100, 4, 4, 2) == 1.0  # every token goes everywhere


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "ep"), [(512, 8, 2, 8), (2048, 64, 6, 8), (4096, 128, 8, 32), (300, 16, 1, 4)]
)
def test_random_imbalance_is_that_of_simulated_routers(tokens: int, experts: int, top_k: int, ep: int) -> None:
    drawn = []
    for seed in range(200):
        ranks = simulated(tokens, experts, top_k, seed).reshape(ep, -1).sum(axis=1)
        drawn.append(ranks.max() / (tokens * top_k / ep))
    excess = np.mean(drawn) - 1
    assert random_imbalance(tokens, experts, top_k, ep) - 1 == pytest.approx(excess, rel=0.08)


def test_no_imbalance_beyond_what_tokens_can_choose() -> None:
    # Four ranks of two experts: a token sends both of its rows to one rank; of one expert each, only one of them.
    assert Routing(100).busiest(4096, 2, 8, 4) == 4
    assert Routing(100).busiest(4096, 2, 4, 4) == 2
    assert random_imbalance(1, 8, 2, 8) <= 4


def test_capacity_by_hand() -> None:
    assert capacity(4096, 2, 8, 1.25) == 1280
    assert capacity(100, 1, 8, 1.0) == 13  # 12.5 rounded up
    assert capacity(10, 1, 1, 1.1) == 11  # and not 12 for 11.000000000000002


def test_loads_under_a_stated_imbalance_by_hand() -> None:
    # 16 rows for 8 experts on 4 ranks: the busiest rank's two get 2 x 2 rows each, the others 4/3 each.
    load = expert_load(Routing(2.0, 1.5), 8, 2, 8, 4)
    assert (load.capacity, load.busiest_rows) == (3, 24)
    assert load.dropped_rows == pytest.approx(2 * (4 - 3))
    assert load.padding_share == pytest.approx(1 - 14 / 24)
    tight = expert_load(Routing(2.0, 0.5), 8, 2, 8, 4)  # one row each: 2 x 3 + 6 x 1/3
    assert tight.dropped_rows == pytest.approx(8)
    assert tight.padding_share == pytest.approx(0)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 1.25])
def test_rows_dropped_at_random_are_those_of_simulated_routers(factor: float) -> None:
    tokens, experts, top_k = 512, 16, 2
    limit = capacity(tokens, top_k, experts, factor)
    dropped = np.mean([np.maximum(simulated(tokens, experts, top_k, s) - limit, 0).sum() for s in range(300)])
    load = expert_load(Routing("random", factor), tokens, top_k, experts, 4)
    assert load.dropped_rows == pytest.approx(dropped, rel=0.06, abs=0.5)


@settings(deadline=None)
@given(imbalance=IMBALANCES, factor=FACTORS, tokens=st.integers(1, 10**5), shape=SHAPES, ep=st.sampled_from([1, 2, 8]))
def test_computed_and_dropped_rows_are_those_asked_for(
    imbalance: float | Literal["random"], factor: float | None, tokens: int, shape: tuple[int, int], ep: int
) -> None:
    experts, top_k = shape
    load = expert_load(Routing(imbalance, factor), tokens, top_k, experts, ep)
    assert load.computed_rows + load.dropped_rows == pytest.approx(tokens * top_k)
    assert 0 <= load.dropped_share <= 1
    assert -1e-9 <= load.padding_share < 1
    assert load.computed_rows <= load.busiest_rows * (1 + 1e-9)
    if factor is None or (imbalance != "random" and factor >= load.imbalance):
        assert load.dropped_rows == 0


@settings(deadline=None)
@given(
    low=st.floats(1, 8),
    more=st.floats(0, 4),
    factor=st.floats(0.25, 4),
    tokens=st.integers(1, 10**5),
    shape=SHAPES,
    ep=st.sampled_from([1, 2, 8]),
)
def test_rows_grow_with_imbalance_and_with_capacity(
    low: float, more: float, factor: float, tokens: int, shape: tuple[int, int], ep: int
) -> None:
    experts, top_k = shape

    def rows(imbalance: float, capacity_factor: float | None = None) -> int:
        return Routing(imbalance, capacity_factor).rows(tokens, top_k, experts, ep)

    assert rows(1.0) == tokens * top_k
    assert rows(1.0) <= rows(low) <= rows(low + more) <= tokens * top_k * ep
    assert rows(low, factor) <= rows(low, factor + more)
    assert rows(low, factor) == rows(low + more, factor)
    dropped = [expert_load(Routing(low, f), tokens, top_k, experts, ep).dropped_rows for f in (factor, factor + more)]
    assert dropped[0] >= dropped[1] - 1e-9


def test_rows_of_a_layout() -> None:
    routed = Axis("routed", 2, 8)
    layout = Layout(batch=2, seq_len=1024, cp=2, tp=2, sequence_parallel=True, ep=4, etp=2, routing=Routing(1.5))
    # 2 x 1024 tokens over cp 2 and tp 2, two choices each; the two ranks that share an expert share their tokens.
    assert layout.size(routed) == ceil(512 * 2 * 1.5) * 2
    full = Layout(batch=2, seq_len=1024, cp=2, tp=2, sequence_parallel=True, ep=4, etp=2, routing=Routing(1.5, 1.25))
    assert full.size(routed) == 8 * 160 * 2
