"""Rows: which slot each row of a batch uses, and how a face is applied to them.

One slot for all: a plain call. Equal groups in order: `vmap` over the slots. Anything else: `vmap`
over the rows that have a delta, with gathered leaves. `fast` is never wrapped in `vmap`: it takes a
slot axis itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import vmap

from deltatune.core.errors import ConfigurationError

__all__ = ["Rows", "fit", "spread"]

Apply = Callable[..., Tensor]


@dataclass(frozen=True)
class Rows:
    """The slot of every row of a batch; None for a row without a delta."""

    slots: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not self.slots:
            raise ConfigurationError(
                "A routing names a slot, or None, for every row; found no row."
            )

    @cached_property
    def uniform(self) -> int | None:
        """The one slot that all rows use, if there is one."""
        return self.slots[0] if len(set(self.slots)) == 1 else None

    @cached_property
    def narrowed(self) -> Rows:
        """One row for any number of them, where all are alike; else the rows as they are."""
        alike = len(self.slots) > 1 and len(set(self.slots)) == 1
        return Rows(self.slots[:1]) if alike else self

    @cached_property
    def empty(self) -> bool:
        """Whether no row has a delta."""
        return all(slot is None for slot in self.slots)

    @cached_property
    def equal(self) -> tuple[int, ...] | None:
        """The slots in order, if rows form contiguous groups of one size and all have a delta."""
        order = list(dict.fromkeys(self.slots))
        if not order or None in order or len(self.slots) % len(order):
            return None
        size = len(self.slots) // len(order)
        expected = tuple(slot for slot in order for _ in range(size))
        return tuple(s for s in order if s is not None) if expected == self.slots else None

    @cached_property
    def repeated(self) -> dict[int, Rows]:
        """How often each row is repeated, to the rows then. Filled by `fit`."""
        return {}

    @cached_property
    def groups(self) -> dict[int | None, list[int]]:
        """Slot to the rows that use it."""
        found: dict[int | None, list[int]] = {}
        for row, slot in enumerate(self.slots):
            found.setdefault(slot, []).append(row)
        return found


def fit(rows: Rows, size: int) -> Rows:
    """The rows for a tensor whose first axis has `size` entries: beams and flattened tokens repeat
    them.
    """
    if size == len(rows.slots):
        return rows
    if size % len(rows.slots):
        raise ConfigurationError(
            f"A module was called with {size} rows, the routing has {len(rows.slots)}. Route every "
            "row of the batch; where a module is called once for all rows, route to one slot."
        )
    factor = size // len(rows.slots)
    if factor not in rows.repeated:  # kept, because what a routing is like is computed once
        rows.repeated[factor] = Rows(tuple(slot for slot in rows.slots for _ in range(factor)))
    return rows.repeated[factor]


def spread(
    face: Apply, rows: Rows, x: Tensor, y: Tensor, leaves: Mapping[str, Tensor], *, slotwise: bool
) -> Tensor:
    """Applies a face to every row with the leaves of its slot.

    Args:
        face: (x, y, leaves) -> new y.
        rows: one slot for each row of `x`.
        x, y: [rows, ...].
        leaves: name to [K, ...].
        slotwise: whether `face` takes a slot axis itself (`fast`), so that it needs no `vmap`.
    """
    if rows.empty:
        return y
    if rows.uniform is not None:
        return face(x, y, {name: leaf[rows.uniform] for name, leaf in leaves.items()})
    apply = _batched(face) if slotwise else vmap(face)
    if rows.equal is not None:
        order = rows.equal
        held = {name: _select(leaf, order) for name, leaf in leaves.items()}
        groups, size = len(order), len(rows.slots) // len(order)
        parts = (x.reshape(groups, size, *x.shape[1:]), y.reshape(groups, size, *y.shape[1:]))
        return apply(*parts, held).flatten(0, 1)
    with_delta = [row for row, slot in enumerate(rows.slots) if slot is not None]
    slots = [slot for slot in rows.slots if slot is not None]
    held = {name: _select(leaf, slots) for name, leaf in leaves.items()}
    index = torch.tensor(with_delta, device=y.device)
    new = apply(x[index], y[index], held)
    return y.index_copy(0, index, new.to(y.dtype))


def _select(leaf: Tensor, slots: Sequence[int]) -> Tensor:
    if list(slots) == list(range(leaf.shape[0])):
        return leaf
    return leaf[torch.tensor(slots, device=leaf.device)]


def _batched(face: Apply) -> Apply:
    def apply(x: Tensor, y: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        flat = x.reshape(x.shape[0], -1, x.shape[-1]), y.reshape(y.shape[0], -1, y.shape[-1])
        return face(*flat, leaves).view(y.shape)

    return apply
