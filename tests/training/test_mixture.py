from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.standin import StandIn, collate, events, make_rows, quick

from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.training import Epochs, Mixture, Steps, fit
from deltatune.training.mixture import MixtureSampler, sampling_rates

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 10.0, math.inf])
BATCHES, SEEDS = st.integers(1, 7), st.integers(0, 2**63 - 1)


def mixture(counts: list[int], **options: Any) -> Mixture:
    rows = {f"task {k}": [(k, row) for row in range(n)] for k, n in enumerate(counts)}
    return Mixture(rows, **options)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    st.floats(0.1, 100),
    st.none() | st.integers(1, 10**5),
)
def test_rates_follow_the_formula(counts: list[int], temperature: float, cap: int | None) -> None:
    """Against the formula in float64 on capped sizes, normalised twice as its authors do."""
    sizes = np.minimum(counts, np.inf if cap is None else cap).astype(np.float64)
    shares = (sizes / sizes.sum()) ** (1 / temperature)
    np.testing.assert_allclose(
        sampling_rates(counts, temperature, cap), shares / shares.sum(), rtol=1e-9
    )


def test_a_temperature_of_one_is_proportional_and_a_large_one_equal() -> None:
    assert sampling_rates([100, 300], 1.0) == pytest.approx((0.25, 0.75))
    assert sampling_rates([100, 300], math.inf) == (0.5, 0.5)
    assert sampling_rates([100, 300], 1.0, cap=50) == (0.5, 0.5)
    assert sampling_rates([100, 900], 2.0) == pytest.approx((0.25, 0.75))
    assert sampling_rates([1, 10**9], 0.01) == pytest.approx((0.0, 1.0))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(50, 2000), min_size=1, max_size=4),
    TEMPERATURES,
    BATCHES,
    st.integers(0, 99),
    st.booleans(),
)
def test_a_task_is_drawn_as_often_as_its_rate_says(
    counts: list[int], temperature: float, size: int, seed: int, mixed: bool
) -> None:
    """Within five standard deviations of a binomial count, and five where it is small."""
    mixed_rows = mixture(counts, temperature=temperature, mixed=mixed)
    steps = 1000 // size if mixed else 1000
    drawn: Counter[int] = Counter()
    for batch in islice(mixed_rows.sampler(size, seed), steps):
        tasks = [mixed_rows.task_of(place) for place in batch]
        assert mixed or len(set(tasks)) == 1
        drawn.update(tasks if mixed else tasks[:1])
    total = sum(drawn.values())
    for task, rate in enumerate(mixed_rows.rates):
        spread = math.sqrt(total * rate * (1 - rate))
        assert abs(drawn[task] - total * rate) <= 5 * spread + 5


@given(COUNTS, TEMPERATURES, BATCHES, SEEDS, st.booleans())
def test_every_task_has_epochs_of_its_own(
    counts: list[int], temperature: float, size: int, seed: int, mixed: bool
) -> None:
    rows = mixture(counts, temperature=temperature, mixed=mixed)
    seen: dict[int, list[int]] = {task: [] for task in range(len(counts))}
    for batch in islice(rows.sampler(size, seed), 60):
        for place in batch:
            task, row = rows[place]
            assert task == rows.task_of(place)
            seen[task].append(row)
    for task, count in enumerate(counts):
        for start in range(0, len(seen[task]), count):
            epoch = seen[task][start : start + count]
            assert len(set(epoch)) == len(epoch)


@settings(deadline=None)
@given(COUNTS, TEMPERATURES, BATCHES, SEEDS, st.integers(0, 90), st.booleans(), st.booleans())
def test_a_restored_sampler_goes_on_alike(
    counts: list[int],
    temperature: float,
    size: int,
    seed: int,
    taken: int,
    mixed: bool,
    grouped: bool,
) -> None:
    rows = mixture(counts, temperature=temperature, mixed=mixed)
    lengths = {"length_grouped": grouped and not mixed}
    if lengths["length_grouped"]:
        tokens = {k: [{"input_ids": [0] * (n % 5)} for n in range(c)] for k, c in enumerate(counts)}
        rows = Mixture({f"task {k}": one for k, one in tokens.items()}, temperature=temperature)
    first, second = rows.sampler(size, seed, **lengths), rows.sampler(size, seed, **lengths)
    begun = [*islice(first, taken)]
    assert begun == [*islice(rows.sampler(size, seed, **lengths), taken)]
    second.restore(first.epoch, first.index)
    assert [*islice(first, 30)] == [*islice(second, 30)]
    assert (first.epoch, first.index) == (second.epoch, second.index)
    assert first.about == second.about


@given(COUNTS, BATCHES, SEEDS, st.integers(0, 60), st.booleans())
def test_the_first_rows_are_those_trained_on_first(
    counts: list[int], size: int, seed: int, wanted: int, mixed: bool
) -> None:
    sampler = mixture(counts, mixed=mixed).sampler(size, seed)
    first = sampler.first(wanted)
    assert len(set(first)) == len(first) <= wanted
    drawn = [row for batch in islice(sampler, sampler.batches_per_epoch) for row in batch]
    assert first == list(dict.fromkeys(drawn))[:wanted]


def test_tasks_of_one_size_are_shuffled_apart() -> None:
    rows = mixture([30, 30], temperature=math.inf)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for batch in islice(MixtureSampler(rows, 5, 0), 40):
        for place in batch:
            seen[rows[place][0]].append(rows[place][1])
    assert seen[0][:30] != seen[1][:30]


@pytest.mark.parametrize(
    ("tasks", "options", "said"),
    [
        ({}, {}, "needs rows"),
        ({"a": [1], "b": []}, {}, r"found \[1, 0\]"),
        ({"a": [1]}, {"temperature": 0.0}, "temperature is a positive number"),
        ({"a": [1]}, {"temperature": math.nan}, "Found nan"),
        ({"a": [1]}, {"cap": 0}, "cap is a number of rows"),
    ],
)
def test_what_cannot_be_meant_is_refused(tasks: Any, options: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Mixture(tasks, **options)


def test_mixed_rows_cannot_be_grouped_by_length() -> None:
    with pytest.raises(ConfigurationError, match="Leave one of the two out"):
        mixture([3], mixed=True).sampler(2, 0, length_grouped=True)


def two_tasks(**options: Any) -> Mixture:
    return Mixture({"many": make_rows(30, 1), "few": make_rows(7, 2)}, **options)


def test_the_log_names_the_tasks_of_every_step(tmp_path: Path) -> None:
    fit(StandIn(), two_tasks(), collate, settings=quick(), budget=Epochs(2), folder=tmp_path)
    steps = events(tmp_path, "step")
    assert len(steps) == 2 * math.ceil(37 / 4)
    drawn = [step["tasks"] for step in steps]
    assert {len(tasks) for tasks in drawn} == {1} and {*drawn[0]} <= {"many", "few"}
    assert {name for tasks in drawn for name in tasks} == {"many", "few"}
    assert all(count <= 4 for tasks in drawn for count in tasks.values())
    (start,) = events(tmp_path, "start")
    assert start["tasks"] == {"many": 30, "few": 7} and start["temperature"] == "1.0"


class Interrupted(Exception):
    """Ends a run from within, at a forward pass."""


class Interrupting(StandIn):
    def set_step(self, step: int) -> None:
        if step == 8:
            raise Interrupted
        super().set_step(step)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_interrupted_run_goes_on_with_the_same_bits(mixed: bool, tmp_path: Path) -> None:
    def end(run: StandIn, folder: Path) -> list[torch.Tensor]:
        rows = two_tasks(temperature=2.0, mixed=mixed)
        fit(run, rows, collate, settings=quick(), budget=Steps(17), folder=folder)
        return [*run.trainable_state().values()]

    with pytest.raises(Interrupted):
        end(Interrupting(), tmp_path / "cut")
    found, expected = end(StandIn(), tmp_path / "cut"), end(StandIn(), tmp_path / "whole")
    assert all(map(torch.equal, found, expected))
    assert events(tmp_path / "cut") == events(tmp_path / "whole")


def test_a_run_does_not_go_on_at_another_temperature(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"settings": quick(), "budget": Steps(4), "folder": tmp_path}
    fit(StandIn(), two_tasks(), collate, **arguments)
    with pytest.raises(ArtefactError, match=r"temperature was '1.0' and is now '2.0'"):
        fit(StandIn(), two_tasks(temperature=2.0), collate, **arguments)
