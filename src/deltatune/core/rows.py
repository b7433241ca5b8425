"""Rows: which slot each row of a batch uses, and how a face is applied to them.

One slot for all: a plain call. Equal groups in order: `vmap` over the slots. Groups of any sizes
in order, of many tokens each: a call for each group. Anything else: `vmap` over the rows that have
a delta, with gathered leaves. `fast` is never wrapped in `vmap`: it takes a slot axis itself. A
face that reads the text is called once for each slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from deltatune.core.errors import ConfigurationError

if TYPE_CHECKING:
    from deltatune.core.text import Text

__all__ = ["Rows", "Runs", "by_slot", "fit", "spread"]

Apply = Callable[..., Tensor]
#: Groups of rows that follow each other: the place of the slot in `Rows.order`, None for rows
#: without a delta, and how many rows there are.
Runs: TypeAlias = tuple[tuple[int | None, int], ...]

# Tokens that a group must have, in the mean, for a call of its own to cost less than leaves
# gathered for every row. LoRA of rank 8 breaks even between 4 and 16, adapters of 64 below 2 (4 and
# 16 groups, widths 384 and 768, fp32, one core).
_WORTH_A_CALL = 16


@dataclass(frozen=True)
class Rows:
    """The slot of every row of a batch; None for a row without a delta.

    What a routing is like is found once, when it is made: a compiler cannot follow later.

    Attributes:
        slots: of the rows.
        uniform: the one slot that all rows use, if there is one.
        empty: whether no row has a delta.
        equal: the slots in order, if rows form contiguous groups of one size and all have a delta.
        groups: slot to the rows that use it.
        order: the slots that rows use, in order of appearance; leaves come in it.
        runs: the groups, if each is contiguous.
        narrowed: one row for any number of them, where all are alike; else the rows as they are.
        repeated: how often each row is repeated, to the rows then. Filled by `fit`.
        kept: what a bank has gathered for this order, where no gradients are asked for.
    """

    slots: tuple[int | None, ...]
    uniform: int | None = field(init=False, compare=False, repr=False)
    empty: bool = field(init=False, compare=False, repr=False)
    equal: tuple[int, ...] | None = field(init=False, compare=False, repr=False)
    groups: dict[int | None, list[int]] = field(init=False, compare=False, repr=False)
    order: tuple[int, ...] = field(init=False, compare=False, repr=False)
    runs: Runs | None = field(init=False, compare=False, repr=False)
    narrowed: Rows = field(init=False, compare=False, repr=False)
    repeated: dict[int, Rows] = field(init=False, compare=False, repr=False)
    kept: dict[Any, Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.slots:
            raise ConfigurationError(
                "A routing names a slot, or None, for every row; found no row."
            )
        groups: dict[int | None, list[int]] = {}
        for row, slot in enumerate(self.slots):
            groups.setdefault(slot, []).append(row)
        alike = len(groups) == 1
        order = tuple(slot for slot in groups if slot is not None)
        found = {
            "uniform": self.slots[0] if alike else None,
            "empty": alike and self.slots[0] is None,
            "equal": _equal(self.slots, groups),
            "groups": groups,
            "order": order,
            "runs": _runs(self.slots, order),
            "narrowed": Rows(self.slots[:1]) if alike and len(self.slots) > 1 else self,
            "repeated": {},
            "kept": {},
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def apart(self, x: Tensor) -> Runs | None:
        """The groups of [rows, ..., features], if it pays to compute each by itself."""
        tokens = x.numel() // x.shape[-1]
        worth = tokens >= _WORTH_A_CALL * len(self.groups)
        return self.runs if worth else None


def _runs(slots: tuple[int | None, ...], order: tuple[int, ...]) -> Runs | None:
    """See `Rows.runs`."""
    found = [(slot, len(list(rows))) for slot, rows in itertools.groupby(slots)]
    place = {slot: number for number, slot in enumerate(order)}
    if len(found) > len({slot for slot, _ in found}):
        return None
    return tuple((None if slot is None else place[slot], size) for slot, size in found)


def _equal(
    slots: tuple[int | None, ...], groups: Mapping[int | None, list[int]]
) -> tuple[int, ...] | None:
    """See `Rows.equal`."""
    size = len(slots) // len(groups)
    order = tuple(slot for slot in groups if slot is not None)
    whole = tuple(slot for slot in order for _ in range(size))
    return order if whole == slots else None


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
    if factor in rows.repeated:
        return rows.repeated[factor]
    repeated = Rows(tuple(slot for slot in rows.slots for _ in range(factor)))
    if not torch.compiler.is_compiling():
        rows.repeated[factor] = repeated
    return repeated


def spread(
    face: Apply, rows: Rows, x: Tensor, y: Tensor, leaves: Mapping[str, Tensor], *, slotwise: bool
) -> Tensor:
    """Applies a face to every row with the leaves of its slot.

    Args:
        face: (x, y, leaves) -> new y.
        rows: one slot for each row of `x`.
        x, y: [rows, ...].
        leaves: name to [slots that are used, ...], in the order of `rows.order`.
        slotwise: whether `face` takes a slot axis itself (`fast`), so that it needs no `vmap`.
    """
    if rows.empty:
        return y
    if rows.uniform is not None:
        return face(x, y, {name: leaf[0] for name, leaf in leaves.items()})
    apply = _batched(face) if slotwise else vmap(face)
    if rows.equal is not None:
        groups, size = len(rows.equal), len(rows.slots) // len(rows.equal)
        parts = (x.reshape(groups, size, *x.shape[1:]), y.reshape(groups, size, *y.shape[1:]))
        return apply(*parts, leaves).flatten(0, 1)
    if (runs := rows.apart(y)) is not None:
        return _by_run(face, runs, x, y, leaves)
    with_delta = [row for row, slot in enumerate(rows.slots) if slot is not None]
    place = {slot: number for number, slot in enumerate(rows.order)}
    places = [place[slot] for slot in rows.slots if slot is not None]
    gather = torch.tensor(places, device=y.device)
    held = {name: leaf[gather] for name, leaf in leaves.items()}
    index = torch.tensor(with_delta, device=y.device)
    new = apply(x[index], y[index], held)
    return y.index_copy(0, index, new.to(y.dtype))


def by_slot(
    face: Apply,
    rows: Rows,
    x: Tensor,
    y: Tensor | None,
    text: Text | None,
    leaves: Mapping[str, Tensor],
    rest: Tensor | None,
) -> Tensor:
    """Applies a face that reads the text: one call for each slot.

    Args:
        face: (x, y, text, leaves) -> [rows, ...].
        rows: at least one has a delta.
        x, y, text, leaves: see `spread`; y and text may be None.
        rest: [rows, ...], what rows without a delta get; None for zeros.
    """
    if rows.uniform is not None:
        return face(x, y, text, {name: leaf[0] for name, leaf in leaves.items()})
    for place, slot in enumerate(rows.order):
        index = torch.tensor(rows.groups[slot], device=x.device)
        own = {name: leaf[place] for name, leaf in leaves.items()}
        of_y = None if y is None else y[index]
        of_text = None if text is None else text.of_rows(index)
        new = face(x[index], of_y, of_text, own)
        rest = new.new_zeros(x.shape[0], *new.shape[1:]) if rest is None else rest
        rest = rest.index_copy(0, index, new.to(rest.dtype))
    assert rest is not None
    return rest


def _by_run(face: Apply, runs: Runs, x: Tensor, y: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    sizes = [size for _, size in runs]
    own = {name: leaf.unbind(0) for name, leaf in leaves.items()}
    parts = zip(runs, torch.split(x, sizes), torch.split(y, sizes), strict=True)
    return torch.cat(
        [
            of_y
            if place is None
            else face(of_x, of_y, {name: leaf[place] for name, leaf in own.items()}).to(y.dtype)
            for (place, _), of_x, of_y in parts
        ]
    )


def _batched(face: Apply) -> Apply:
    def apply(x: Tensor, y: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        flat = x.reshape(x.shape[0], -1, x.shape[-1]), y.reshape(y.shape[0], -1, y.shape[-1])
        return face(*flat, leaves).view(y.shape)

    return apply
