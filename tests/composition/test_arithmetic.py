"""Arithmetic against PEFT 0.21 on the same vectors, against float64 formulas, and by its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.composition.plain import SEEDS, change, flat
from torch import Tensor

from deltatune.composition import add, average, dare, ties
from deltatune.core.errors import ConfigurationError

WEIGHTS = st.floats(-3, 3)
FEW = settings(max_examples=30, deadline=None)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@FEW
@given(st.lists(SEEDS, min_size=1, max_size=4), st.data())
def test_add_is_peft_s_task_arithmetic(seeds: list[int], data: st.DataObject) -> None:
    merging = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    weights = data.draw(st.lists(WEIGHTS, min_size=len(seeds), max_size=len(seeds)))
    changes = [change(seed) for seed in seeds]
    wanted = merging.task_arithmetic([flat(one) for one in changes], torch.tensor(weights))
    close(flat(add(changes, weights)), wanted)


@FEW
@given(SEEDS, SEEDS, SEEDS, WEIGHTS)
def test_a_change_is_a_vector(x: int, y: int, z: int, w: float) -> None:
    a, b, c = change(x), change(y), change(z)
    close(flat(a - a), torch.zeros(len(flat(a))).double())
    close(flat(a + b), flat(b + a))
    close(flat((a + b) + c), flat(a + (b + c)))
    close(flat(w * (a - b)), w * flat(a) - flat(b) * w)
    close(flat(-a), -flat(a))
    close(flat(a * 0.0), 0 * flat(a))
    close(flat(add([a, b], [1.0, 0.0])), flat(a))


@FEW
@given(st.lists(SEEDS, min_size=1, max_size=4), st.permutations(range(4)))
def test_an_average_is_the_mean_in_any_order(seeds: list[int], order: list[int]) -> None:
    changes = [change(seed) for seed in seeds]
    wanted = torch.stack([flat(one) for one in changes]).mean(0)
    close(flat(average(changes)), wanted)
    close(flat(average([changes[k] for k in order if k < len(changes)])), wanted)
    close(flat(average([changes[0]] * 3, [1.0, 2.0, 0.5])), flat(changes[0]))


@FEW
@given(st.lists(SEEDS, min_size=1, max_size=4), st.floats(0.1, 0.99), st.data())
def test_ties_is_peft_s_on_the_whole_vector(
    seeds: list[int], density: float, data: st.DataObject
) -> None:
    merging = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    positive = st.floats(0.1, 3)
    weights = data.draw(st.lists(positive, min_size=len(seeds), max_size=len(seeds)))
    changes = [change(2 * seed) for seed in seeds]  # all name the same parameters
    wanted = merging.ties([flat(one) for one in changes], torch.tensor(weights).double(), density)
    close(flat(ties(changes, density=density, weights=weights)), wanted)


def written_out(changes: list[np.ndarray], density: float) -> np.ndarray:
    """TIES of Yadav et al. with weights of one, entry by entry."""
    trimmed = []
    for one in changes:
        least = np.sort(np.abs(one))[len(one) - max(1, int(density * len(one)))]
        trimmed.append(np.where(np.abs(one) >= least, one, 0.0))
    out = np.zeros_like(changes[0])
    for place in range(len(out)):
        values = [one[place] for one in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agree = [value for value in values if value * sign > 0]
        out[place] = sum(agree) / len(agree) if agree else 0.0
    return out


@FEW
@given(st.lists(SEEDS, min_size=2, max_size=4), st.floats(0.1, 1.0))
def test_ties_is_its_formula(seeds: list[int], density: float) -> None:
    changes = [change(2 * seed) for seed in seeds]
    wanted = written_out([flat(one).numpy() for one in changes], density)
    close(flat(ties(changes, density=density)), torch.from_numpy(wanted))


@FEW
@given(SEEDS, st.lists(st.floats(0.1, 2.0), min_size=1, max_size=3))
def test_ties_of_one_direction_at_density_one_is_the_mean(seed: int, sizes: list[float]) -> None:
    changes = [size * change(seed) for size in sizes]
    close(flat(ties(changes, density=1.0)), flat(average(changes)))


@FEW
@given(SEEDS, SEEDS, st.floats(0, 0.95))
def test_dare_keeps_scaled_entries_or_none(seed: int, draw: int, rate: float) -> None:
    one = change(seed)
    dropped = dare(one, rate=rate, seed=draw)
    found, whole = flat(dropped), flat(one)
    kept = found != 0
    close(found[kept] * (1 - rate), whole[kept])
    assert flat(dare(one, rate=rate, seed=draw)).equal(found)
    close(flat(dare(one, rate=0.0, seed=draw)), whole)


def test_dare_is_right_in_the_mean_and_as_peft_drops() -> None:
    one, rate, draws = change(2), 0.7, 2000
    found = torch.stack([flat(dare(one, rate=rate, seed=k)) for k in range(draws)])
    # The variance of an entry x is x² rate / (1 - rate).
    error = (found.mean(0) - flat(one)).abs() / flat(one).abs()
    assert error.max() < 5 * (rate / (1 - rate) / draws) ** 0.5
    shares = (found != 0).double().mean(0)
    assert (shares - (1 - rate)).abs().max() < 0.06
    merging = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    torch.manual_seed(0)
    theirs = merging.dare_linear([flat(one)] * draws, torch.ones(draws).double() / draws, 1 - rate)
    torch.testing.assert_close(found.mean(0), theirs, rtol=0.3, atol=0.05)


def test_draws_differ_by_seed_and_parameter() -> None:
    one = change(2)
    a, b = (flat(dare(one, rate=0.5, seed=seed)) != 0 for seed in (0, 1))
    assert not a.equal(b)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: ties([a], density=0.0), "density must lie in"),
        (lambda a: ties([a], density=1.5), "density must lie in"),
        (lambda a: ties([a, a], weights=[1.0, -1.0]), "give -change"),
        (lambda a: dare(a, rate=1.0), "rate must lie in"),
        (lambda a: average([a, a], [1.0, -1.0]), "A mean takes weights"),
        (lambda a: average([a, a], [0.0, 0.0]), "A mean takes weights"),
        (lambda a: add([a], [float("nan")]), "finite weights"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(call, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=said):
        call(change(1))
