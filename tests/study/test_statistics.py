"""Intervals, tests and ranks over tasks, against values computed otherwise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deltatune.core.errors import ConfigurationError
from deltatune.study.statistics import critical_distance, interval, mean_ranks, pairs

SCORES = st.lists(st.floats(0, 1), min_size=3, max_size=12)


@settings(deadline=None)  # the first call imports scipy
@given(SCORES)
def test_the_interval_holds_the_mean_and_lies_within_the_values(values: list[float]) -> None:
    low, high = interval(values, draws=200)
    rounding = 1e-12
    assert min(values) - rounding <= low <= high <= max(values) + rounding
    assert interval(values, draws=200) == (low, high)


def test_the_interval_is_that_of_theory_for_many_values() -> None:
    values = [k / 400 for k in range(400)]
    error = 1.96 * math.sqrt(1 / 12 / 400)
    low, high = interval(values)
    assert low == pytest.approx(0.49875 - error, abs=0.004)
    assert high == pytest.approx(0.49875 + error, abs=0.004)
    assert interval([0.3]) == (0.3, 0.3)


def test_two_arms_are_told_apart_by_their_tasks() -> None:
    first = [0.5 + 0.01 * k for k in range(10)]
    second = [score - 0.02 - 0.001 * k for k, score in enumerate(first)]
    (pair,) = pairs({"a": first, "b": second})
    assert (pair.wins, pair.losses) == (10, 0)
    assert pair.low > 0
    assert pair.difference == pytest.approx(0.0245)
    assert pair.p == pytest.approx(2 * 0.5**10)  # all ten of one sign, counted out
    (same,) = pairs({"a": first, "b": first})
    assert (same.difference, same.p, same.wins) == (0.0, 1.0, 0)


def test_p_is_corrected_for_all_pairs() -> None:
    scores = {
        name: [0.5 + shift + 0.013 * ((k * step) % 7) for k in range(9)]
        for name, shift, step in (("a", 0.2, 3), ("b", 0.1, 4), ("c", 0.0, 5))
    }
    found = pairs(scores)
    plain = [
        stats.wilcoxon(
            [x - y for x, y in zip(scores[p.first], scores[p.second], strict=True)],
            zero_method="zsplit",
        ).pvalue
        for p in found
    ]
    smallest = min(range(3), key=plain.__getitem__)
    assert found[smallest].p == pytest.approx(min(1.0, 3 * plain[smallest]))
    assert all(one.p >= p for one, p in zip(found, plain, strict=True))


def test_ranks_and_the_critical_distance_are_those_of_demsar() -> None:
    # Demsar 2006, section 3.2.2: 4 classifiers on 14 data sets, q = 2.569.
    assert critical_distance(4, 14) == pytest.approx(1.25, abs=0.005)
    scores = {"a": [0.9, 0.8, 0.7], "b": [0.8, 0.8, 0.6], "c": [0.7, 0.9, 0.5]}
    assert mean_ranks(scores) == pytest.approx({"a": 4.5 / 3, "b": 6.5 / 3, "c": 7 / 3})


def test_arms_without_the_same_tasks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="a: 2, b: 1"):
        pairs({"a": [0.1, 0.2], "b": [0.1]})
    with pytest.raises(ConfigurationError, match="no values"):
        interval([])
    with pytest.raises(ConfigurationError, match="at least 2 arms"):
        critical_distance(1, 3)
