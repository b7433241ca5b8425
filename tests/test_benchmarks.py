"""The harness of measurements: it counts what it says and judges a row by its own bound."""

from __future__ import annotations

import pytest
import torch
from benchmarks.harness import interleave, row, saved_bytes, step_memory
from benchmarks.shares import KINDS
from torch import nn


def test_every_contender_runs_in_every_round_and_once_before() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 4)
    assert calls[:3] == ["a", "b", "c"] and sorted(calls) == sorted("abc" * 5)
    assert set(times) == set("abc") and all(seconds >= 0 for seconds in times.values())
    rounds = [calls[start : start + 3] for start in range(3, 15, 3)]
    assert (
        all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(map(tuple, rounds))) > 1
    )


@pytest.mark.parametrize(
    ("over", "ratio", "holds"),
    [("floor", 2.0, False), ("peer", 0.5, True), ("gain", 2.0, True), ("itself", 4.0, False)],
)
def test_a_row_is_judged_by_its_bound(over: str, ratio: float, holds: bool) -> None:
    found = row("1", "a step, ms", 4.0, peer=8.0, floor=2.0, over=over, must=1.5)
    assert (found.ratio, found.holds) == (ratio, holds)
    assert found.must == (">= 1.5" if over == "gain" else "<= 1.5")


def test_kept_bytes_are_those_of_distinct_storages_without_parameters() -> None:
    model = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = model(x)
        return (y * y + y * y).sum()

    assert saved_bytes(model, forward) == 4 * 8 * 4  # y, kept four times


def test_the_peak_of_a_step_is_measured_in_a_process_of_its_own() -> None:
    def prepare() -> object:
        return lambda: torch.ones(64 << 20, dtype=torch.uint8).sum()

    assert step_memory(prepare) >= 60 << 20  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="died"):
        step_memory(lambda: 1 / 0)  # type: ignore[arg-type, return-value]


def test_a_miss_comes_with_the_profile_of_its_contenders() -> None:
    a = torch.randn(128, 128)
    works = {"ours": lambda: a @ a, "floor": lambda: a.clone()}
    held = row("1", "x", 1.0, floor=1.0, over="floor", must=2.0, contenders=works)
    assert not held.profile
    missed = row("1", "x", 4.0, floor=1.0, over="floor", must=2.0, contenders=works)
    assert set(missed.profile) == set(works)
    assert set(missed.profile["ours"]) == set(KINDS) == set(missed.profile["floor"])
    assert missed.profile["ours"]["products"] > 0 == missed.profile["floor"]["products"]
    assert missed.profile["floor"]["copies"] > 0
