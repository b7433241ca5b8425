"""Learning rates searched between two bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.study.fake import TASKS, execute
from tests.study.test_comparison import compare

from deltatune.core.errors import ConfigurationError, TrainingError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.comparison import Comparison
from deltatune.study.search import Search, parse_rates
from deltatune.study.select import Grid
from deltatune.study.store import MemoryStore

SEARCH = Search(trials=8, low=1e-5, high=1e-1, relative=False)


@given(st.integers(3, 99), st.floats(1e-6, 1.0), st.floats(1.1, 1e4), st.booleans())
def test_a_search_can_be_written_and_read(
    trials: int, low: float, times: float, relative: bool
) -> None:
    low = float(f"{low:g}")
    high = float(f"{low * times:g}")
    search = Search(trials=trials, low=low, high=high, relative=relative)
    assert parse_rates(str(search)) == search


@pytest.mark.parametrize(
    "text", ["12 of 1e-3", "x of 1e-4..1e-2", "12 of x0.1..10", "5 of 1e-2..1e-4", "2 of 1..2"]
)
def test_a_search_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_rates(text)


def test_anything_else_is_a_grid() -> None:
    assert parse_rates("x0.3,x1") == Grid(values=(0.3, 1.0))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_proposals_keep_to_the_bounds_and_follow_from_the_scores(salt: int) -> None:
    def trials() -> list[float]:
        scores: dict[float, float] = {}
        for number in range(SEARCH.trials):
            rate = SEARCH.propose(1.0, scores)
            failed = (number * 7 + salt) % 5 == 0
            scores[rate] = -math.inf if failed else -abs(math.log10(rate) + 3) - salt
        return list(scores)

    found = trials()
    assert found == trials()
    assert all(SEARCH.low <= rate <= SEARCH.high for rate in found)
    assert len(set(found)) == SEARCH.trials


def test_the_proposals_gather_where_the_scores_are_high() -> None:
    search = Search(trials=20, low=1e-6, high=1.0, relative=False)
    scores: dict[float, float] = {}
    for _ in range(search.trials):
        rate = search.propose(1.0, scores)
        scores[rate] = -((math.log10(rate) + 2.3) ** 2)
    best = max(scores, key=scores.__getitem__)
    assert abs(math.log10(best) + 2.3) < 0.3
    near = [rate for rate in list(scores)[10:] if abs(math.log10(rate) + 2.3) < 1]
    assert len(near) >= 5, "twice as many as by chance, and more"


def test_a_comparison_searches_for_each_arm_and_goes_on() -> None:
    store, ran = MemoryStore(), list[Cell]()

    def counted(cell: Cell) -> CellResult:
        ran.append(cell)
        return execute(cell)

    found = compare(store, counted, grid=SEARCH, methods=("full", "prompt"))
    assert len(found.searched) == 2 * SEARCH.trials * len(TASKS)
    for choice in found.choices.values():
        assert len(choice.means) == SEARCH.trials
        assert choice.rate is not None and 1e-4 < choice.rate < 1e-2
    count = len(ran)
    assert compare(store, counted, grid=SEARCH, methods=("full", "prompt")).searched
    assert len(ran) == count, "the same proposals: nothing is run twice"


def test_a_rate_that_fails_is_not_proposed_for_good() -> None:
    def diverges(cell: Cell) -> CellResult:
        if (cell.learning_rate or 0) > 3e-3:
            raise TrainingError("The loss is not finite.")
        return execute(cell)

    found = compare(MemoryStore(), diverges, grid=SEARCH, methods=("full",))
    (choice,) = found.choices.values()
    assert choice.rate is not None and choice.rate <= 3e-3


def test_a_search_is_not_extended() -> None:
    with pytest.raises(ConfigurationError, match="keeps to its bounds"):
        Comparison(backbones=("a",), tasks=("b",), methods=("full",), grid=SEARCH, extend=1)
