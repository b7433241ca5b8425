"""The bank: every leaf of K deltas of one shape, as K rows.

Row k is one flat fp32 `Parameter` that holds all trained leaves of slot k, so that swapping,
saving, freezing, clipping and the optimiser act on one tensor. The rows lie in one buffer [K, n]; a
forward joins them without a copy and splits them once. They are laid together again after `.to`,
`deepcopy` and pickling; correctness never depends on it.

Leaves that all slots share are one more flat parameter beside the rows. Whoever asks for a slot's
leaves finds them among its own; their gradient is the sum over the slots of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltatune.core.errors import StateError
from deltatune.core.fingerprint import digest
from deltatune.core.leaf import Leaf, draw
from deltatune.core.whole import is_sharded, overwrite, whole

__all__ = ["Bank", "Flat"]


class _Join(torch.autograd.Function):
    """[K, n] from K rows that lie in one buffer: no copy forward, one row each backward."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, *rows: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.versions = [row._version for row in rows]
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # The rows are set through `.data`, so torch's own check does not see that one was changed.
        if ctx.versions != [row._version for row in ctx.rows]:
            raise StateError(
                "A slot of the bank was changed in place between forward and backward. "
                "Take the optimiser step, or load, after the backward pass."
            )
        return None, *gradients[0].unbind(0)


@dataclass(frozen=True)
class Flat:
    """How leaves lie in a flat tensor.

    Attributes:
        shapes: name to shape, in order.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def sizes(self) -> list[int]:
        """The entries of each."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def numel(self) -> int:
        """The entries of all."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The leaves [..., *shape] in a tensor [..., entries], as views."""
        pieces = torch.split(flat, self.sizes, dim=-1)
        return {
            name: piece.view(*flat.shape[:-1], *shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def overwrite(self, flat: Tensor, values: Mapping[str, Tensor]) -> None:
        """Sets a flat tensor to leaves, each of which must be there in its shape."""
        overwrite(flat, [values[name].reshape(shape) for name, shape in self.shapes.items()])


class Bank(nn.Module):
    """K rows of the same leaves.

    Args:
        leaves: name to description. Ties are resolved already.
        slots: K.
        device: where the rows live.
        shared: the names of those that all slots have in common.

    Attributes:
        sharing: the names of what they have in common.
        own: what lies in the row of a slot.
        common: what lies in `shared`, which is None where nothing does.
    """

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        slots: int,
        device: torch.device,
        shared: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.sharing = frozenset(shared)
        leaves = dict(sorted(leaves.items()))  # as safetensors lays them in a file
        self.trained = {name: leaf.shape for name, leaf in leaves.items() if leaf.trained}
        self.own = Flat({n: shape for n, shape in self.trained.items() if n not in shared})
        self.common = Flat({n: shape for n, shape in self.trained.items() if n in shared})
        buffer = torch.zeros(slots, self.own.numel, device=device)
        self.slots = nn.ParameterList(nn.Parameter(row) for row in buffer.unbind(0))
        self.shared: nn.Parameter | None = None
        if self.common.shapes:
            self.shared = nn.Parameter(torch.zeros(self.common.numel, device=device))
        self.fixed: dict[str, str] = {}
        for index, (name, leaf) in enumerate(leaves.items()):
            if not leaf.trained:
                self.fixed[name] = f"fixed_{index}"
                rows = 1 if name in shared else slots
                held = torch.zeros(rows, *leaf.shape, dtype=leaf.dtype, device=device)
                self.register_buffer(f"fixed_{index}", held)
        self._opened: dict[tuple[torch.dtype, tuple[int, ...], bool], dict[str, Tensor]] | None = (
            None
        )

    @property
    def count(self) -> int:
        """K."""
        return len(self.slots)

    @property
    def numel(self) -> int:
        """Trained entries of one slot, with those that it shares."""
        return self.own.numel + self.common.numel

    @property
    def total(self) -> int:
        """Trained entries of all slots, what they share once."""
        return self.count * self.own.numel + self.common.numel

    @torch.no_grad()
    def draw(
        self, slot: int, leaves: Mapping[str, Leaf], seed: int, *, shared: bool = True
    ) -> None:
        """Sets one slot to its initial values; with `shared`, what all slots share too."""
        held = {} if shared else self.read(slot)
        kept = {name: held[name] for name in self.sharing & held.keys()}
        drawn = {n: draw(leaf, seed, n) for n, leaf in leaves.items() if n not in kept}
        self.write(slot, drawn | kept)

    @torch.no_grad()
    def write(self, slot: int, values: Mapping[str, Tensor]) -> None:
        """Sets the leaves of one slot; every leaf must be there, in its shape. Those that it shares
        are then those of all slots.
        """
        self.own.overwrite(self.slots[slot], values)
        if self.shared is not None:
            self.common.overwrite(self.shared, values)
        for name, held in self._fixed(slot).items():
            held.copy_(values[name])

    def overwrite(self, slot: int, row: Tensor) -> None:
        """Sets all trained leaves of one slot from a flat row in the order of `own`."""
        overwrite(self.slots[slot], [row])

    def read(self, slot: int) -> dict[str, Tensor]:
        """The leaves of one slot, as views of its row; with the graph, where gradients are on."""
        values = self.own.split(whole(self.slots[slot]))
        if self.shared is not None:
            values |= self.common.split(whole(self.shared))
        return values | self._fixed(slot)

    def _fixed(self, slot: int) -> dict[str, Tensor]:
        held = {name: getattr(self, at) for name, at in self.fixed.items()}
        return {name: rows[0 if name in self.sharing else slot] for name, rows in held.items()}

    def gradients(self, slot: int) -> dict[str, Tensor]:
        """The gradients of the trained leaves of one slot, as views; zeros before a backward."""
        found = self.own.split(_gradient(self.slots[slot]))
        return found if self.shared is None else found | self.common.split(_gradient(self.shared))

    def digest(self, slot: int) -> str:
        """A digest of all that one slot holds."""
        shared = {} if self.shared is None else {"shared": whole(self.shared)}
        return digest({"row": whole(self.slots[slot]), **shared, **self._fixed(slot)})

    def _pack(self) -> None:
        """Lays the rows together in one buffer, unless they are sharded."""
        if any(is_sharded(row) for row in self.slots):
            return
        buffer = torch.stack([row.detach() for row in self.slots])
        for row, place in zip(self.slots, buffer.unbind(0), strict=True):
            row.data = place

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts the bank, as `nn.Module` does, and lays its rows together again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def joined(self, order: Sequence[int]) -> Tensor:
        """Rows in some order, [slots, n]; without a copy where they lie so in the buffer."""
        rows = [self.slots[slot] for slot in order]
        if len(rows) == 1:
            alone: Tensor = rows[0].unsqueeze(0)
            return alone
        # Where a compiler looks on, checks of storages and versions would break the graph; the rows
        # of a sharded bank lie where FSDP has gathered them.
        if torch.compiler.is_compiling() or not _adjacent(rows):
            return torch.stack(rows)
        first = rows[0].detach()
        buffer = first.as_strided((len(rows), len(first)), (len(first), 1), first.storage_offset())
        joined: Tensor = _Join.apply(buffer, *rows)  # type: ignore[no-untyped-call]
        return joined

    def open(self) -> None:
        """Begins a forward: until `close`, leaves are joined and split once for each dtype."""
        self._opened = {}

    def close(self) -> None:
        """Ends a forward."""
        self._opened = None

    def stacked(
        self, dtype: torch.dtype, order: tuple[int, ...], kept: dict[Any, Any]
    ) -> dict[str, Tensor]:
        """The leaves of some slots, [slots, *shape] each, in `dtype`; indices as they are.

        Args:
            dtype: of the leaves that are no integers.
            order: the slots. The others get no gradient: no optimiser moves them.
            kept: where copies may be kept that are made without gradients, for as long as a batch
                is routed. They are made anew when torch has counted a change of a slot.
        """
        # A reentrant checkpoint runs its blocks without gradients, in the midst of a forward.
        key = (dtype, order, torch.is_grad_enabled())
        if self._opened is not None and key in self._opened:
            return self._opened[key]
        values = self._kept(dtype, order, kept)
        if self._opened is not None:
            self._opened[key] = values
        return values

    def _kept(
        self, dtype: torch.dtype, order: tuple[int, ...], kept: dict[Any, Any]
    ) -> dict[str, Tensor]:
        if torch.compiler.is_compiling():  # it keeps what it wants itself
            return self._split(dtype, order)
        rows = [self.slots[slot] for slot in order]
        copied = dtype != torch.float32 or not _adjacent(rows)
        rows += [] if self.shared is None else [self.shared]
        if torch.is_grad_enabled() or not copied or any(row.is_inference() for row in rows):
            kept.clear()
            return self._split(dtype, order)
        marks = [(row.data_ptr(), row._version) for row in rows]
        key = (id(self), dtype, torch.is_inference_mode_enabled())
        if kept.get(key, ((), {}))[0] != marks:
            kept[key] = marks, self._split(dtype, order)
        values: dict[str, Tensor] = kept[key][1]
        return values

    def _split(self, dtype: torch.dtype, order: tuple[int, ...]) -> dict[str, Tensor]:
        values = self.own.split(self.joined(order).to(dtype))
        if self.shared is not None:
            shared = self.shared.to(dtype).expand(len(order), -1)
            values |= self.common.split(shared)
        whole_order = order == tuple(range(self.count))
        for name, attribute in self.fixed.items():
            fixed = getattr(self, attribute)
            fixed = fixed.to(dtype) if fixed.is_floating_point() else fixed
            if name in self.sharing:
                values[name] = fixed.expand(len(order), *fixed.shape[1:])
            else:
                values[name] = fixed if whole_order else fixed[list(order)]
        return values

    def __getstate__(self) -> dict[str, Any]:
        # What is opened belongs to a forward under way and cannot be copied with its graph.
        return {**self.__dict__, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


def _gradient(row: Tensor) -> Tensor:
    return whole(torch.zeros_like(row) if row.grad is None else row.grad)


def _adjacent(rows: Sequence[Tensor]) -> bool:
    first, step = rows[0], rows[0].numel() * rows[0].element_size()
    return all(
        row.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and row.data_ptr() == first.data_ptr() + k * step
        for k, row in enumerate(rows)
    )
