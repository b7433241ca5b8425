from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError
from deltatune.training.parts import check_lengths, cut, pack

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=60)
BUDGET = st.integers(1, 200)


@given(LENGTHS, BUDGET, st.booleans())
def test_parts_keep_to_the_budget_and_lose_nothing(
    lengths: list[int], tokens: int, packed: bool
) -> None:
    parts = cut(lengths, tokens, packed=packed)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        held = [lengths[row] for row in part]
        assert len(part) == 1 or (sum(held) if packed else len(held) * max(held)) <= tokens
    order = [lengths[row] for part in parts for row in part]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 100), st.booleans())
def test_no_other_parts_in_this_order_cost_less(
    lengths: list[int], tokens: int, packed: bool
) -> None:
    def cost(parts: Sequence[Sequence[int]], each: int) -> int:
        computed = [sum(part) if packed else len(part) * max(part) for part in parts]
        if any(held > tokens and len(part) > 1 for held, part in zip(computed, parts, strict=True)):
            return 10**9
        return sum(computed) + each * len(parts)

    order = sorted(lengths, reverse=True)
    for device, each in ((None, tokens), (torch.device("cpu"), 32)):
        found = cut(lengths, tokens, packed=packed, device=device)
        others = (
            [order[a:b] for a, b in itertools.pairwise([0, *places, len(order)])]
            for count in range(len(order))
            for places in itertools.combinations(range(1, len(order)), count)
        )
        best = min(cost(parts, each) for parts in others)
        assert cost([[lengths[row] for row in part] for part in found], each) == best


def test_padding_is_dearer_than_another_pass_on_a_cpu() -> None:
    lengths = [100, 10, 10, 10]
    assert len(cut(lengths, 1000)) == 1
    assert len(cut(lengths, 1000, device=torch.device("cpu"))) == 2


@given(LENGTHS, BUDGET)
def test_without_padding_parts_are_fewer(lengths: list[int], tokens: int) -> None:
    assert len(cut(lengths, tokens, packed=True)) <= len(cut(lengths, tokens))


def test_a_row_that_no_pass_can_hold_is_refused() -> None:
    rows = [{"input_ids": [1] * length} for length in (3, 9, 2)]
    check_lengths(rows, 9, owner="The data", setting="tokens")
    with pytest.raises(ConfigurationError, match=r"The data has a row of 9.*Raise `tokens`"):
        check_lengths(rows, 8, owner="The data", setting="tokens")


@given(LENGTHS, BUDGET, st.data())
def test_bins_hold_every_row_once_and_never_too_much(
    lengths: list[int], width: int, data: st.DataObject
) -> None:
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    bins = pack(lengths, width, groups)
    assert sorted(row for held in bins for row in held) == list(range(len(lengths)))
    limit = max(width, *lengths)
    assert all(sum(lengths[row] for row in held) <= limit for held in bins)
    of_bins = [{groups[row] for row in held} for held in bins]
    assert all(len(group) == 1 for group in of_bins)
    order = [group for one in of_bins for group in one]
    assert order == sorted(order, key=list(dict.fromkeys(groups)).index)  # groups stay together


@given(LENGTHS, BUDGET)
def test_two_bins_that_would_fit_into_one_are_never_left(lengths: list[int], width: int) -> None:
    bins = pack(lengths, width, [0] * len(lengths))
    fills = sorted(sum(lengths[row] for row in held) for held in bins)
    assert len(fills) < 2 or fills[0] + fills[1] > fills[-1]


def test_bins_are_no_wider_than_their_number_asks_for() -> None:
    assert pack([50, 50, 50, 50], 110, [0] * 4) == [[0, 1], [2, 3]]
    assert len(pack([30] * 10, 128, [0] * 10)) == 3
    rows = [70, 60, 40, 30]
    filled = [sum(rows[row] for row in held) for held in pack(rows, 128, [0] * 4)]
    assert filled == [100, 100]
