"""Errors against numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simllm.validation.scoring import Outcome, percentile, score, score_by, spearman, typical

values = st.floats(min_value=1e-3, max_value=1e6)


def outcome(key: str, predicted: float, measured: float, utilisation: tuple[float, float] | None = None) -> Outcome:
    known = utilisation or (None, None)
    return Outcome(
        key=key,
        predicted=predicted,
        measured=measured,
        predicted_utilisation=known[0],
        measured_utilisation=known[1],
    )


def test_errors_are_of_the_medians_of_each_configuration():
    rows = [
        # Key a: median prediction 9, median measurement 10: -10 %. The outlier of 100 counts for nothing.
        outcome("a", 9, 10),
        outcome("a", 9, 100),
        outcome("a", 9, 8),
        outcome("b", 12, 10),  # +20 %
        outcome("c", 10, 10),  # 0 %
        outcome("d", 5, 10),  # -50 %
    ]
    found = score(rows)
    assert found.count == 4
    assert found.mean_absolute_percentage_error == pytest.approx((10 + 20 + 0 + 50) / 4)
    assert found.median_absolute_percentage_error == pytest.approx(15)
    # Sorted 0, 10, 20, 50: position 2.7.
    assert found.p90_absolute_percentage_error == pytest.approx(20 + 0.7 * 30)
    assert found.bias == pytest.approx((-10 + 20 + 0 - 50) / 4)


def test_the_median_of_an_even_number_of_repetitions_is_between_the_two():
    [key] = typical([outcome("a", 1, 10), outcome("a", 3, 20)])
    assert (key.predicted, key.measured) == (2, 15)


def test_spearman_ranks_utilisation_where_it_is_known():
    rows = [
        outcome("a", 1, 1, (0.5, 0.3)),
        outcome("b", 2, 2, (0.4, 0.4)),
        outcome("c", 3, 3, (0.3, 0.5)),
    ]
    found = score(rows)
    assert found.spearman == pytest.approx(-1)
    assert found.spearman_value == pytest.approx(1)
    assert score([outcome(o.key, o.predicted, o.measured) for o in rows]).spearman == pytest.approx(1)


def test_spearman_gives_ties_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, spreads 4.5 and 5.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 2], [1, 2]) is None


def test_nothing_to_score_is_no_number():
    empty = score([])
    assert empty.count == 0
    assert empty.mean_absolute_percentage_error is None
    assert empty.spearman is None


def test_groups_come_with_the_largest_first():
    items = [("x", outcome("1", 1, 1)), ("y", outcome("2", 2, 1)), ("y", outcome("3", 2, 1))]
    found = score_by(items, lambda item: item[0], lambda item: item[1])
    assert list(found) == ["y", "x"]
    assert found["y"].mean_absolute_percentage_error == pytest.approx(100)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=30))
def test_order_of_the_errors(pairs):
    found = score([outcome(str(i), p, m) for i, (p, m) in enumerate(pairs)])
    worst = max(abs(100 * (p - m) / m) for p, m in pairs)
    assert 0 <= found.median_absolute_percentage_error <= found.p90_absolute_percentage_error * (1 + 1e-9) + 1e-9
    assert found.p90_absolute_percentage_error <= worst * (1 + 1e-9)
    assert abs(found.bias) <= found.mean_absolute_percentage_error * (1 + 1e-9) + 1e-9
    assert found.spearman is None or -1.000001 <= found.spearman <= 1.000001


@given(st.lists(values, min_size=1, max_size=30), st.floats(min_value=0, max_value=1))
def test_percentiles_lie_between_the_extremes(numbers, fraction):
    ordered = sorted(numbers)
    found = percentile(ordered, fraction)
    assert ordered[0] <= found * (1 + 1e-12)
    assert found <= ordered[-1] * (1 + 1e-12)
    assert percentile(ordered, 0) == ordered[0]
    assert percentile(ordered, 1) == ordered[-1]
