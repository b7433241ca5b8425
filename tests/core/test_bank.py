"""The bank: K rows of the same leaves, right whatever happens to their storage."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltatune.core.bank import Bank
from deltatune.core.errors import StateError
from deltatune.core.leaf import Leaf, draw, fixed, normal, ones, uniform, zeros

LEAVES: dict[str, Leaf] = {
    "a": normal(3, 4, std=1.0),
    "b": uniform(5, bound=0.5),
    "at": fixed((2,), lambda shape, random: torch.randint(9, shape, generator=random), torch.int64),
    "c": ones(2, 1, 2),
}


def made(slots: int = 3) -> Bank:
    bank = Bank(LEAVES, slots, torch.device("cpu"))
    for slot in range(slots):
        bank.draw(slot, LEAVES, slot)
    return bank


def used(bank: Bank) -> Tensor:
    """Something that depends on every leaf of every slot, differently."""
    leaves = bank.stacked(torch.float32, tuple(range(bank.count)), {})
    weights = torch.arange(1.0, bank.count + 1)
    parts = [leaves[n].flatten(1).square().sum(1) * k for k, n in enumerate("abc", 1)]
    return (sum(parts[1:], parts[0]) * weights).sum()


def gradients(bank: Bank) -> list[Tensor]:
    bank.zero_grad()
    used(bank).backward()
    found = [row.grad for row in bank.slots]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def moved(bank: Bank) -> Bank:
    return bank.double().float()


def pickled(bank: Bank) -> Bank:
    return pickle.loads(pickle.dumps(bank))


def loaded(bank: Bank) -> Bank:
    fresh = Bank(LEAVES, bank.count, torch.device("cpu"))
    fresh.load_state_dict(bank.state_dict())
    return fresh


@pytest.mark.parametrize("change", [copy.deepcopy, pickled, moved, loaded])
def test_rows_are_right_after(
    change: Callable[[Bank], Bank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEAVES, "at", fixed((2,), _two, torch.int64))  # a lambda has no pickle
    bank = made()
    value, grads = used(bank).detach().clone(), gradients(bank)
    other = change(bank)
    assert torch.equal(used(other), value)
    for mine, theirs in zip(grads, gradients(other), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        other.slots[1].mul_(2)
    assert not torch.equal(used(other), value)
    assert torch.equal(other.read(1)["a"], other.stacked(torch.float32, (1,), {})["a"][0])


def _two(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randint(9, shape, generator=random)


def test_joined_rows_have_the_gradients_of_separate_ones() -> None:
    bank = made()
    for slot, gradient in enumerate(gradients(bank)):
        alone = made()
        leaves = alone.read(slot)
        total = sum(leaves[n].square().sum() * k for k, n in enumerate("abc", 1)) * (slot + 1)
        assert isinstance(total, Tensor)
        total.backward()
        assert torch.allclose(gradient, alone.slots[slot].grad)


def test_rows_lie_in_one_buffer_and_are_joined_without_a_copy() -> None:
    bank = made()
    assert bank.joined(range(3)).data_ptr() == bank.slots[0].data_ptr()
    bank.slots[1].data = bank.slots[1].data.clone()
    assert torch.equal(bank.joined(range(3)), torch.stack(list(bank.slots)))
    for again in (moved(bank), copy.deepcopy(bank)):  # these lay them together again
        assert again.joined(range(3)).data_ptr() == again.slots[0].data_ptr()


def test_a_slot_that_no_row_uses_gets_no_gradient() -> None:
    bank = made()
    bank.stacked(torch.float32, (0, 2), {})["a"].sum().backward()
    assert [row.grad is not None for row in bank.slots] == [True, False, True]


@pytest.mark.parametrize("slots", [1, 2])
def test_a_change_between_forward_and_backward_is_noticed(slots: int) -> None:
    bank = made(slots)
    value = used(bank)
    with torch.no_grad():
        bank.slots[0].add_(1)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        value.backward()
    if slots > 1:
        assert issubclass(StateError, RuntimeError)


def test_leaves_are_split_once_a_forward_and_anew_where_gradients_are_off() -> None:
    bank = made()
    bank.open()
    one = bank.stacked(torch.float32, (0, 1, 2), {})
    assert bank.stacked(torch.float32, (0, 1, 2), {}) is one
    with torch.no_grad():
        assert not bank.stacked(torch.float32, (0, 1, 2), {})["a"].requires_grad
    assert bank.stacked(torch.float32, (0, 1, 2), {})["a"].requires_grad
    assert bank.stacked(torch.bfloat16, (0, 1, 2), {})["a"].dtype == torch.bfloat16
    assert bank.stacked(torch.bfloat16, (0, 1, 2), {})["at"].dtype == torch.int64
    bank.close()
    assert bank.stacked(torch.float32, (0, 1, 2), {}) is not one


@settings(max_examples=50, deadline=None)
@given(
    st.permutations(range(4)), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_slots_come_in_the_order_asked_for(
    order: list[int], count: int, dtype: torch.dtype
) -> None:
    bank, chosen = made(4), tuple(order[:count])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            leaves = bank.stacked(dtype, chosen, {})
            for name, leaf in leaves.items():
                own = torch.stack([bank.read(slot)[name] for slot in chosen])
                assert torch.equal(leaf, own if name == "at" else own.to(dtype))
    (leaves["a"].float().flatten(1).sum(1) * torch.arange(1.0, count + 1)).sum().backward()
    for slot, row in enumerate(bank.slots):
        assert (row.grad is not None) == (slot in chosen)
        if row.grad is not None:
            assert row.grad.max() == chosen.index(slot) + 1


def test_copies_are_kept_while_a_batch_is_routed_and_nothing_changes() -> None:
    bank, kept = made(), dict[Any, Any]()

    def held() -> Tensor:
        return bank.stacked(torch.float32, (2, 0), kept)["a"]

    with torch.no_grad():
        first = held()
        assert held() is first
        bank.write(0, bank.read(1))
        second = held()
        assert second is not first and torch.equal(second[1], bank.read(1)["a"])
        bank.slots[2].data = bank.slots[2].data * 2
        assert torch.equal(held()[0], bank.read(2)["a"])
    assert held().requires_grad and not kept  # training changes them in ways that are not counted
    with torch.no_grad():
        assert bank.stacked(torch.float32, (0, 1), kept) and not kept  # these are no copies


def test_written_is_read() -> None:
    bank = made()
    values = {name: torch.full(leaf.shape, 3).to(leaf.dtype) for name, leaf in LEAVES.items()}
    bank.write(1, values)
    assert all(torch.equal(bank.read(1)[name], value) for name, value in values.items())
    assert not torch.equal(bank.read(0)["a"], values["a"])
    assert bank.numel == 12 + 5 + 4 and bank.count == 3


def test_draws_depend_on_seed_and_name_alone() -> None:
    leaf = normal(4, 4, std=1.0)
    assert torch.equal(draw(leaf, 1, "x"), draw(leaf, 1, "x"))
    assert not torch.equal(draw(leaf, 1, "x"), draw(leaf, 1, "y"))
    assert not torch.equal(draw(leaf, 1, "x"), draw(leaf, 2, "x"))
    alone = Bank({"a": LEAVES["a"]}, 1, torch.device("cpu"))
    alone.draw(0, {"a": LEAVES["a"]}, 2)
    assert torch.equal(alone.read(0)["a"], made().read(2)["a"])
    assert not draw(zeros(3), 0, "x").any()


def test_a_fill_of_another_shape_is_an_error_of_its_author() -> None:
    with pytest.raises(ValueError, match=r"announced as \(2,\)"):
        draw(Leaf((2,), lambda shape, random: torch.zeros(3)), 0, "x")
