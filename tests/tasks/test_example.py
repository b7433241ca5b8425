from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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
