from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.study.fake import execute
from tests.study.test_store import make_cell

from deltatune.core.errors import ConfigurationError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.select import Grid, beyond, choose


@pytest.mark.parametrize(
    ("text", "preset", "rates"),
    [
        ("1e-4,3e-4,1e-3", 0.3, (1e-4, 3e-4, 1e-3)),
        ("x3, x0.3,x1", 1e-3, (3e-4, 1e-3, 3e-3)),
        ("x1", 0.3, (0.3,)),
    ],
)
def test_a_grid_is_rates_or_factors(text: str, preset: float, rates: tuple[float, ...]) -> None:
    assert Grid.parse(text).rates(preset) == pytest.approx(rates)


@pytest.mark.parametrize("text", ["", "1e-3,x2", "fast", "-1e-3", "0", "inf", "nan", "x"])
def test_a_grid_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="Learning rates are positive numbers"):
        Grid.parse(text)


@given(st.sets(st.floats(1e-6, 10.0), min_size=1), st.booleans())
def test_a_grid_can_be_written_and_read(values: set[float], relative: bool) -> None:
    grid = Grid(values=tuple(sorted({float(f"{v:g}") for v in values})), relative=relative)
    assert Grid.parse(str(grid)) == grid


def test_a_grid_is_extended_at_the_ratio_of_its_edge() -> None:
    assert beyond([1e-4, 3e-4, 1e-3], 1e-4) == pytest.approx(1e-4 / 3, rel=1e-4)
    assert beyond([1e-3, 1e-4, 3e-4], 1e-3) == pytest.approx(1e-2 / 3, rel=1e-4)


def scored(
    rate: float, validation: float, test: float = 0.5, seed: int = 0
) -> tuple[Cell, CellResult]:
    cell = make_cell(seed).with_learning_rate(rate)
    fields = execute(cell).model_dump()
    scores = {"metric": "a", "scores": {"a": test}, "validation": {"a": validation}}
    return cell, CellResult(**{**fields, **scores})


def test_validation_decides_and_test_does_not() -> None:
    choice = choose([scored(1e-4, 0.7, 0.1), scored(3e-4, 0.9, 0.2), scored(1e-3, 0.8, 0.99)])
    assert choice.rate == 3e-4 and not choice.at_edge
    assert choice.means == {1e-4: 0.7, 3e-4: 0.9, 1e-3: 0.8}


def test_a_study_that_chose_on_its_test_rows_can_be_repeated() -> None:
    tried = [scored(1e-4, 0.7, 0.1), scored(3e-4, 0.9, 0.2), scored(1e-3, 0.8, 0.99)]
    choice = choose(tried, on="test")
    assert choice.rate == 1e-3 and choice.means == {1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.99}


def test_the_mean_over_seeds_and_tasks_decides_and_the_lower_of_equals_wins() -> None:
    tried = [scored(1e-4, 0.6, seed=0), scored(1e-4, 0.8, seed=1)]
    tried += [scored(1e-3, 0.9, seed=0), scored(1e-3, 0.5, seed=1)]
    assert choose(tried).rate == 1e-4


def test_a_best_value_at_the_edge_is_said() -> None:
    assert choose([scored(1e-4, 0.7), scored(3e-4, 0.9)]).at_edge
    assert not choose([scored(1e-4, 0.7)]).at_edge


def test_a_rate_with_a_failed_or_missing_run_is_not_chosen() -> None:
    failed = make_cell(1).with_learning_rate(1e-3)
    tried = [scored(1e-4, 0.1), scored(1e-4, 0.1, seed=1), scored(1e-3, 0.9), (failed, None)]
    assert choose(tried).rate == 1e-4
    assert choose([*tried[:2], tried[2]]).rate == 1e-4
    assert choose([scored(1e-4, math.nan)]).rate is None
    assert choose([]).rate is None
