from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError
from deltatune.tasks.example import Example, Splits


def _splits(count: int) -> Splits:
    examples = tuple(Example(str(i), ("a",), (), None, f"{i:016x}") for i in range(count))
    return Splits(examples, examples[:3], examples[:3], "here", "local")


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_a_smaller_limit_is_inside_a_larger_one(first: int, second: int, seed: int) -> None:
    small, large = sorted((first, second))
    whole = _splits(25)
    inner, outer = whole.limit(train=small, seed=seed), whole.limit(train=large, seed=seed)
    assert len(inner.train) == min(small, 25)
    assert set(inner.train) <= set(outer.train) <= set(whole.train)
    positions = [whole.train.index(example) for example in outer.train]
    assert positions == sorted(positions)


def test_a_limit_is_noted_and_leaves_the_rest() -> None:
    whole = _splits(25)
    limited = whole.limit(train=5, seed=7)
    assert limited.notes == ("train: 5 of 25 rows drawn, seed 7.",)
    assert limited.test == whole.test
    assert limited.digest != whole.digest
    assert whole.limit() == whole


def test_seeds_draw_differently() -> None:
    whole = _splits(25)
    assert whole.limit(train=5, seed=0).train != whole.limit(train=5, seed=1).train


def _labelled(*labels: int | float | None) -> Splits:
    examples = tuple(
        Example(str(i), (str(label),), (), label, f"{i:016x}") for i, label in enumerate(labels)
    )
    return Splits(examples, examples[:1], examples[:2], "here", "local")


@given(st.integers(1, 4), st.integers(0, 100))
def test_shots_are_those_of_the_papers_procedure(count: int, seed: int) -> None:
    whole = _labelled(*(0, 1, 1, 2) * 9)
    lines = list(whole.train)
    numpy.random.seed(seed)
    numpy.random.shuffle(lines)  # type: ignore[arg-type]
    by_label: dict[object, list[Example]] = {}
    for line in lines:
        by_label.setdefault(line.label, []).append(line)
    few = whole.shots(count, seed)
    assert list(few.train) == [line for lines in by_label.values() for line in lines[:count]]
    assert list(few.validation) == [
        line for lines in by_label.values() for line in lines[count : 2 * count]
    ]
    assert few.test == whole.test
    assert few.notes == (f"{count} shots of each of 3 groups, drawn with seed {seed}.",)


def test_shots_of_values_and_of_texts() -> None:
    few = _labelled(*(float(i % 6) for i in range(60))).shots(4, 13)
    assert sum(float(example.label or 0) >= 2.5 for example in few.train) == 4
    assert len(_labelled(*(None,) * 20).shots(8, 13).train) == 8


@pytest.mark.parametrize("count", [0, 3])
def test_shots_that_there_are_not(count: int) -> None:
    with pytest.raises(ConfigurationError, match=r"at least 1|need 6 .*'1' has 2"):
        _labelled(0, 0, 0, 0, 0, 0, 1, 1).shots(count, 0)
