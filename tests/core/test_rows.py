"""Rows: any routing gives what a loop over rows gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.rows import Rows, fit, spread

SLOTS = 3
random = torch.Generator().manual_seed(0)
LEAVES = {
    "w": torch.randn(SLOTS, 4, 4, generator=random),
    "b": torch.randn(SLOTS, 4, generator=random),
}
routings = st.lists(st.none() | st.integers(0, SLOTS - 1), min_size=1, max_size=8)


def face(x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    return y + torch.tanh(x @ p["w"].mT) + p["b"]


def fast(x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    return y + torch.tanh(x @ p["w"].mT) + p["b"].unsqueeze(-2)


@settings(max_examples=120, deadline=None)
@given(routings, st.sampled_from([(2,), (2, 3), (40,)]), st.booleans(), st.booleans())
def test_any_routing_equals_a_loop(
    slots: list[int | None], inner: tuple[int, ...], slotwise: bool, grouped: bool
) -> None:
    if grouped:
        slots.sort(key=lambda slot: SLOTS - 1.5 if slot is None else slot)
    shape = (len(slots), *inner, 4)
    x, y = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).unbind(0)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in LEAVES.items()}
    rows = Rows(tuple(slots))
    used = {name: leaf[list(rows.order)] for name, leaf in leaves.items()}
    made = spread(fast if slotwise else face, rows, x, y, used, slotwise=slotwise)
    separate = {name: leaf.clone().requires_grad_() for name, leaf in LEAVES.items()}
    wanted = torch.stack(
        [
            y[i] if k is None else face(x[i], y[i], {n: leaf[k] for n, leaf in separate.items()})
            for i, k in enumerate(slots)
        ]
    )
    torch.testing.assert_close(made, wanted)
    if made.requires_grad:
        made.square().sum().backward()
        wanted.square().sum().backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, separate[name].grad)


@settings(deadline=None)
@given(routings, st.integers(1, 4))
def test_beams_follow_their_rows(slots: list[int | None], beams: int) -> None:
    fitted = fit(Rows(tuple(slots)), len(slots) * beams)
    assert fitted.slots == tuple(slot for slot in slots for _ in range(beams))
    assert sum(map(len, fitted.groups.values())) == len(fitted.slots)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 rows, the routing has 2"):
        fit(Rows((0, 1)), 3)
    with pytest.raises(ConfigurationError, match="found no row"):
        Rows(())


def test_groups_are_seen() -> None:
    assert Rows((1, 1, 1)).uniform == 1 and Rows((None, None)).empty
    assert Rows((2, 2, 0, 0)).equal == (2, 0)
    assert Rows((0, 1, 0, 1)).equal is Rows((0, None)).equal is Rows((0, 0, 1)).equal is None


def test_groups_that_follow_each_other_are_computed_apart_where_it_pays() -> None:
    rows = Rows((2, 2, 2, None, 0))
    assert rows.runs == ((0, 3), (None, 1), (1, 1))
    assert Rows((2, 0, 2)).runs is None
    assert rows.apart(torch.zeros(5, 10, 4)) == rows.runs
    assert rows.apart(torch.zeros(5, 1, 4)) is None
    assert Rows((2, 0, 2)).apart(torch.zeros(3, 400, 4)) is None
