from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.training.budget import (
    Budget,
    Epochs,
    Nothing,
    Seconds,
    Spent,
    Steps,
    Tokens,
    parse,
)

BUDGETS = st.one_of(
    st.integers(1, 10**12).map(Steps),
    st.floats(1e-6, 1e9).map(Epochs),
    st.floats(1e-6, 1e9).map(Seconds),
    st.integers(1, 10**15).map(Tokens),
)


@given(BUDGETS | st.just(Nothing()))
def test_parse_inverts_str(budget: Budget) -> None:
    assert parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("300 steps", Steps(300)),
        ("1 step", Steps(1)),
        ("1_000 steps", Steps(1000)),
        (" 2.5epochs ", Epochs(2.5)),
        ("90 seconds", Seconds(90)),
        ("10 minutes", Seconds(600)),
        ("1.5 Hours", Seconds(5400)),
        ("1e6 tokens", Tokens(1_000_000)),
        (" Nothing", Nothing()),
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert parse(text) == budget


@pytest.mark.parametrize(
    "text", ["300", "steps", "", "-3 steps", "0 steps", "1.5 steps", "1.2.3 epochs"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="Found"):
        parse(text)


def test_an_unknown_unit_comes_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'epocs'.*'epochs'"):
        parse("3 epocs")


@pytest.mark.parametrize("kind", [Steps, Epochs, Seconds, Tokens])
@pytest.mark.parametrize("count", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_positive(kind: type[Budget], count: float) -> None:
    with pytest.raises(ConfigurationError, match="positive"):
        kind(count)  # type: ignore[arg-type]


def test_steps_are_known_beforehand_or_not() -> None:
    totals = [budget.total_steps(7) for budget in (Steps(5), Epochs(1.5), Seconds(5), Tokens(5))]
    assert totals == [5, 11, None, None]


@given(BUDGETS, st.integers(1, 1000))
def test_the_fraction_begins_at_zero(budget: Budget, steps_per_epoch: int) -> None:
    assert budget.fraction(Spent(0, 0.0, 0), steps_per_epoch) == 0.0


@given(BUDGETS, st.integers(1, 1000))
def test_a_budget_counts_one_thing(budget: Budget, steps_per_epoch: int) -> None:
    total = budget.total_steps(steps_per_epoch)
    exact = {
        Steps: Spent(total or 0, 0.0, 0),
        Epochs: Spent(total or 0, 0.0, 0),
        Seconds: Spent(0, float(budget.count), 0),
        Tokens: Spent(0, 0.0, int(budget.count)),
    }
    assert budget.fraction(exact[type(budget)], steps_per_epoch) == 1.0


def test_nothing_is_spent_before_it_begins() -> None:
    assert Nothing().fraction(Spent(0, 0.0, 0), 5) == 1.0
    assert Nothing().total_steps(5) == 0
