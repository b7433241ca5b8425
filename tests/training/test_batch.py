from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from tests.training.standin import Row, make_rows

from deltatune.core.errors import ConfigurationError
from deltatune.training.batch import (
    count_loss_items,
    count_tokens,
    describe_tensors,
    digest_rows,
    row_length,
    visited,
)


def test_tokens_leave_padding_out() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 8
    assert count_tokens({"input_ids": ids}) == 10
    assert count_tokens({"pixels": ids}) == 0


@pytest.mark.parametrize(
    ("labels", "items"),
    [
        (torch.tensor([[5, 6, -100], [7, -100, -100]]), 3),
        (torch.full((2, 3), -100), 0),
        (torch.tensor([0, 2, 1]), 3),
        (torch.tensor([0.5, 2.0]), 2),
        (torch.rand(4, 3), 4),
    ],
)
def test_a_loss_is_a_mean_over_its_items(labels: torch.Tensor, items: int) -> None:
    assert count_loss_items({"labels": labels}) == items


@dataclass(frozen=True)
class Several(Row):
    """A row with other right answers."""

    others: tuple[Row, ...] = ()


def test_a_visit_draws_one_of_several_right_answers() -> None:
    (plain,) = make_rows(1)
    assert visited(plain, 0, 3, 7) is plain
    several = Several(plain.input_ids, 0, (Row(plain.input_ids, 1), Row(plain.input_ids, 2)))
    drawn = [visited(several, 13, step, 7).labels for step in range(900)]
    assert drawn == [visited(several, 13, step, 7).labels for step in range(900)]
    assert drawn != [visited(several, 21, step, 7).labels for step in range(900)]
    assert drawn != [visited(several, 13, step, 8).labels for step in range(900)]
    counts = Counter(drawn)
    assert all(240 < counts[label] < 360 for label in range(3))
    other = replace(several, others=several.others[:1])
    assert digest_rows([several]) != digest_rows([other]) != digest_rows([plain])


def test_without_labels_rows_are_counted() -> None:
    assert count_loss_items({"input_ids": torch.zeros(6, 2)}) == 6


def test_a_row_has_a_length() -> None:
    assert row_length({"input_ids": [1, 2]}) == 2
    assert row_length(make_rows(1)[0]) == len(make_rows(1)[0].input_ids)
    with pytest.raises(ConfigurationError, match=r"input_ids.*'tuple'"):
        row_length((1, 2))


def test_a_digest_sees_values_and_order() -> None:
    rows = make_rows(5)
    assert digest_rows(rows) == digest_rows(make_rows(5))
    assert digest_rows(rows) != digest_rows(rows[::-1])
    assert digest_rows(rows) != digest_rows(rows[:4])


def test_tensors_are_described_by_name_shape_and_dtype() -> None:
    one = describe_tensors({"a": torch.zeros(2, 3)})
    assert one == describe_tensors({"a": torch.ones(2, 3)})
    assert one.startswith("1 tensors, ")
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).half()}]
    assert one not in [describe_tensors(other) for other in others]
