"""Dropout on what a face reads: drawn from a key, and drawn again in the backward pass.

What was dropped is determined by (seed of the slot, step, site), so neither the mask nor the
dropped input is kept for the backward pass: the input itself is, which the sites that read it
share. On the CPU masks are 16 random bits an entry from SFC64, about ten times as fast as torch's
generator; the rate is rounded to 1/65536 and what is kept is scaled to match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltatune.core.leaf import key_of

__all__ = ["Mask", "drop"]

_LEVELS = 1 << 16


class Mask:
    """Which entries of an input are dropped.

    Args:
        rate: the share of entries that is.
        keys: for each slot in the batch, what its draw depends on, and the rows that use it. Rows
            in none of them keep all.
    """

    def __init__(self, rate: float, keys: Sequence[tuple[tuple[object, ...], list[int]]]) -> None:
        self.level = round(rate * _LEVELS)
        self.keys = [(key_of("dropout", *key), members) for key, members in keys]
        self.held: list[Tensor] = []

    def times(self, x: Tensor, *, hold: bool = False) -> Tensor:
        """`x` without the dropped entries, the others scaled up.

        Args:
            x: [rows, ...].
            hold: keep what was drawn for the next call, which forgets it.
        """
        drawn = self.held or [self._draw(key, len(rows), x) for key, rows in self.keys]
        self.held = drawn if hold else []
        if len(self.keys) == 1 and len(self.keys[0][1]) == x.shape[0]:
            return self._masked(x, drawn[0])
        result = x.clone()
        for (_, rows), kept in zip(self.keys, drawn, strict=True):
            index = torch.tensor(rows, device=x.device)
            result[index] = self._masked(x[index], kept)
        return result

    def _masked(self, x: Tensor, kept: Tensor) -> Tensor:
        """A product of two dtypes takes a CPU twice as long as to convert one of them before."""
        return kept.to(x.dtype).mul_(x).mul_(_LEVELS / (_LEVELS - self.level))

    def _draw(self, key: int, rows: int, x: Tensor) -> Tensor:
        """1 where an entry is kept, 0 where not, as bytes."""
        shape = (rows, *x.shape[1:])
        if x.device.type != "cpu":
            random = torch.Generator(x.device).manual_seed(key)
            kept = torch.empty(shape, dtype=torch.uint8, device=x.device)
            return kept.bernoulli_(1 - self.level / _LEVELS, generator=random)
        count = x[0].numel() * rows
        bits = np.random.SFC64(key).random_raw((count + 3) // 4).view(np.uint16)[:count]
        return torch.from_numpy((bits >= self.level).view(np.uint8)).view(shape)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return mask.times(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.mask.times(gradients[0]), None


@contextmanager
def drop(x: Tensor, mask: Mask) -> Iterator[Tensor]:
    """`x` after dropout. Whatever saves it for the backward pass within the block saves `x`
    instead, from which it is made again.
    """
    dropped: Tensor = _Drop.apply(x, mask)  # type: ignore[no-untyped-call]
    if not torch.is_grad_enabled():
        yield dropped
        return
    with torch.autograd.graph.saved_tensors_hooks(*_hooks(x.detach(), dropped, mask)):
        yield dropped


def _hooks(
    x: Tensor, dropped: Tensor, mask: Mask
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """How to save and get back a tensor, where `dropped` is not worth saving.

    Hooks that were there before (a checkpoint's) go on to act on what is saved.
    """
    place, size, version = dropped.data_ptr(), dropped.numel(), x._version
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    outer_pack, outer_unpack = outer or (_same, _same)

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() != place or tensor.numel() != size or not tensor.is_contiguous():
            return None, outer_pack(tensor)
        return tensor.shape, outer_pack(x)

    def unpack(held: Any) -> Tensor:
        shape, packed = held
        found: Tensor = outer_unpack(packed)
        if shape is None:
            return found
        if found is x and x._version != version:
            raise RuntimeError("An input was changed in place after dropout had read it.")
        return mask.times(found, hold=True).view(shape)

    return pack, unpack


def _same(value: Any) -> Any:
    return value
