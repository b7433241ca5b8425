"""The order of rows: explicit, seeded, restorable.

The batches of an epoch follow from (seed, epoch) and nothing else, so that the state to be kept is
two numbers. Every row comes exactly once in an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["Order", "Sampler", "epoch_batches"]

# Rows are sorted by length within so many batches: enough to make lengths alike within a batch, few
# enough that batches stay random. transformers' length-grouped sampler uses the same number.
_MEGA_BATCH = 50


class Order(Protocol):
    """An endless iterator over batches of row indices, whose place is two numbers.

    Attributes:
        epoch: the epoch of the next batch.
        index: the place of the next batch in its epoch.
        identity: what must be equal for a run to go on in this order, as JSON values.
    """

    epoch: int
    index: int
    identity: Mapping[str, Any]

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches of one epoch."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What the log says of the last batch, as JSON values."""

    def first(self, count: int) -> list[int]:
        """The rows of the first epoch in their order, so many at most."""

    def restore(self, epoch: int, index: int) -> None:
        """Goes to a place; the following batches are those that followed it before."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def __next__(self) -> list[int]: ...


def epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """Returns the batches of one epoch, as indices of rows.

    Args:
        count: the number of rows.
        batch_size: the rows of a batch; one batch may be smaller.
        seed: of the order.
        epoch: from 0.
        lengths: of the rows, to put rows of similar length together; None for a plain shuffle.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(count)
    if lengths is None:
        return _cut(order.tolist(), batch_size)
    batches: list[list[int]] = []
    for mega in _cut(order.tolist(), batch_size * _MEGA_BATCH):
        # Python's sort is stable: rows of equal length stay in the shuffled order.
        batches += _cut(sorted(mega, key=lambda row: -lengths[row]), batch_size)
    return [batches[place] for place in generator.permutation(len(batches)).tolist()]


class Sampler:
    """An endless iterator over batches of row indices.

    Args:
        count: the number of rows.
        batch_size: the rows of a batch.
        seed: of the order.
        lengths: of the rows, to put rows of similar length together; None for a plain shuffle.

    Attributes:
        epoch: the epoch of the next batch.
        index: the place of the next batch in its epoch.
    """

    identity: Mapping[str, Any] = {}
    about: Mapping[str, Any] = {}

    def __init__(
        self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None
    ) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._lengths = lengths
        self.restore(0, 0)

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches of one epoch."""
        return -(-self._count // self._batch_size)

    def afresh(self) -> Sampler:
        """The same order from its beginning."""
        return Sampler(self._count, self._batch_size, self._seed, self._lengths)

    def first(self, count: int) -> list[int]:
        """The rows of the first epoch in their order, so many at most."""
        args = (self._count, self._batch_size, self._seed, 0, self._lengths)
        return [row for batch in epoch_batches(*args) for row in batch][:count]

    def restore(self, epoch: int, index: int) -> None:
        """Goes to a place; the following batches are those that followed it before."""
        self.epoch, self.index = epoch, index
        self._batches = self._draw()

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> list[int]:
        if self.index == len(self._batches):
            self.epoch, self.index = self.epoch + 1, 0
            self._batches = self._draw()
        self.index += 1
        return self._batches[self.index - 1]

    def _draw(self) -> list[list[int]]:
        return epoch_batches(self._count, self._batch_size, self._seed, self.epoch, self._lengths)


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
