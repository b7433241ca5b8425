"""Mixtures: the training rows of several tasks as one, drawn by temperature.

Task i is drawn with a probability in proportion to min(n_i, cap)^(1/T), n_i being the number of its
rows (Raffel et al. 2020, section 3.5.2): at T = 1 as its rows are many, at a large T all alike.
Which tasks the batches of an epoch are of follows from (seed, epoch), and each task's rows come in
epochs of its own, without replacement, so that the state to be kept is two numbers here too.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from deltatune.core.errors import ConfigurationError
from deltatune.training.batch import row_length
from deltatune.training.sampler import Order, Sampler
from deltatune.training.settings import Settings

__all__ = ["Mixture", "MixtureSampler", "order_of", "sampling_rates"]

_TASKS, _ROWS = 1, 2  # which of the draws of a seed


class Mixture(Sequence[Any]):
    """The rows of several tasks, one task's behind the other's; what `fit` takes as its rows.

    An epoch is as many batches as all rows make, whatever tasks they are drawn from.

    Args:
        tasks: name to rows.
        temperature: T, from which the shares of the tasks follow; may be infinite.
        cap: so many rows of a task count at most; None: all.
        mixed: whether a task is drawn for each row of a batch, not for the batch.

    Attributes:
        names: of the tasks, in the order given.
        counts: how many rows each has.
        rates: with which probability each is drawn.

    Raises ConfigurationError for a task without rows, or a temperature or cap that is not positive.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Any]],
        *,
        temperature: float = 1.0,
        cap: int | None = None,
        mixed: bool = False,
    ) -> None:
        self.names, self.counts = tuple(tasks), tuple(map(len, tasks.values()))
        self.rates = sampling_rates(self.counts, temperature, cap)
        self.temperature, self.cap, self.mixed = float(temperature), cap, mixed
        self._rows = [row for rows in tasks.values() for row in rows]
        self._tasks = [task for task, count in enumerate(self.counts) for _ in range(count)]

    def map(self, change: Callable[[int, Any], Any]) -> Mixture:
        """The same mixture of other rows.

        Args:
            change: the number of a task and one of its rows to the row that takes its place.
        """
        made = copy.copy(self)
        made._rows = list(map(change, self._tasks, self._rows))
        return made

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        return self._rows[place]

    def task_of(self, place: int) -> int:
        """The number of the task that a row belongs to."""
        return self._tasks[place]

    def sampler(self, batch_size: int, seed: int, *, length_grouped: bool = False) -> Order:
        """Batches of its rows.

        Raises ConfigurationError if rows are to be grouped by length and mixed.
        """
        return MixtureSampler(self, batch_size, seed, length_grouped=length_grouped)


class MixtureSampler:
    """An endless iterator over batches of places in a mixture; see `Sampler`.

    Args:
        mixture: whose rows.
        batch_size: the rows of a batch; the last one of a task's epoch may be smaller.
        seed: of the order of tasks and rows.
        length_grouped: whether rows of similar length of a task come together.
    """

    def __init__(
        self, mixture: Mixture, batch_size: int, seed: int, *, length_grouped: bool = False
    ) -> None:
        if length_grouped and mixture.mixed:
            raise ConfigurationError(
                "length_grouped sorts the rows of a task, and the rows of a mixed batch are drawn "
                "one by one. Leave one of the two out."
            )
        self._mixture, self._batch_size, self._seed = mixture, batch_size, seed
        self._draws = batch_size if mixture.mixed else 1  # of a task, for each batch
        self._bounds = np.cumsum(mixture.rates)[:-1]
        self._starts = np.cumsum([0, *mixture.counts]).tolist()
        lengths = [row_length(row) for row in mixture] if length_grouped else None
        self._samplers = [
            Sampler(
                count,
                batch_size // self._draws,
                _seed(seed, task),
                None if lengths is None else lengths[start : start + count],
            )
            for task, (start, count) in enumerate(zip(self._starts, mixture.counts, strict=False))
        ]
        self.identity: Mapping[str, Any] = {
            "tasks": dict(zip(mixture.names, mixture.counts, strict=True)),
            "temperature": str(mixture.temperature),
            "cap": mixture.cap,
            "mixed": mixture.mixed,
        }
        self.restore(0, 0)

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches that all rows of the mixture make."""
        return -(-len(self._mixture) // self._batch_size)

    @property
    def about(self) -> Mapping[str, Any]:
        """The tasks of the last batch, each with the number of its rows."""
        drawn = Counter(self._mixture.task_of(place) for place in self._last)
        return {"tasks": {self._mixture.names[task]: drawn[task] for task in sorted(drawn)}}

    def first(self, count: int) -> list[int]:
        """The rows that are drawn first, in their order, each once, so many at most."""
        again = MixtureSampler(self._mixture, self._batch_size, self._seed)
        again._samplers = [one.afresh() for one in self._samplers]
        found: dict[int, None] = {}
        for _ in range(self.batches_per_epoch):
            found |= dict.fromkeys(next(again) if len(found) < count else ())
        return list(found)[:count]

    def restore(self, epoch: int, index: int) -> None:
        """Goes to a place; the following batches are those that followed it before."""
        self.epoch, self.index = epoch, index
        self._last: Sequence[int] = ()
        self._drawn = self._draw(epoch)
        before = [self._draw(past) for past in range(epoch)] + [self._drawn[:index]]
        counts = sum(np.bincount(one.ravel(), minlength=len(self._samplers)) for one in before)
        for sampler, count in zip(self._samplers, np.asarray(counts).tolist(), strict=True):
            sampler.restore(*divmod(count, sampler.batches_per_epoch))

    def __iter__(self) -> MixtureSampler:
        return self

    def __next__(self) -> list[int]:
        if self.index == len(self._drawn):
            self.epoch, self.index = self.epoch + 1, 0
            self._drawn = self._draw(self.epoch)
        self.index += 1
        batch = [
            self._starts[task] + row
            for task in self._drawn[self.index - 1].tolist()
            for row in next(self._samplers[task])
        ]
        self._last = batch
        return batch

    def _draw(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The tasks of the batches of an epoch, [batches, draws]."""
        random = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self._seed, _TASKS, epoch]))
        )
        drawn = random.random((self.batches_per_epoch, self._draws))
        return np.searchsorted(self._bounds, drawn, side="right")


def order_of(rows: Sequence[Any], settings: Settings) -> Order:
    """The order in which rows are trained on: that of a mixture, or a shuffle."""
    if isinstance(rows, Mixture):
        return rows.sampler(
            settings.rows_per_step, settings.seed, length_grouped=settings.length_grouped
        )
    lengths = [row_length(row) for row in rows] if settings.length_grouped else None
    return Sampler(len(rows), settings.rows_per_step, settings.seed, lengths)


def sampling_rates(
    counts: Sequence[int], temperature: float = 1.0, cap: int | None = None
) -> tuple[float, ...]:
    """With which probability each task is drawn: min(count, cap)^(1/T) over the sum of these.

    Args:
        counts: how many rows each task has.
        temperature: T.
        cap: see `Mixture`.

    Raises ConfigurationError; see `Mixture`.
    """
    if not counts or min(counts) < 1:
        raise ConfigurationError(f"Every task of a mixture needs rows; found {list(counts)}.")
    if not temperature > 0:  # NaN too
        raise ConfigurationError(
            f"temperature is a positive number: 1 draws tasks as their rows are many, larger ones "
            f"more evenly. Found {temperature!r}."
        )
    if cap is not None and cap < 1:
        raise ConfigurationError(f"cap is a number of rows from 1 on, or None; found {cap!r}.")
    # By logarithms: a low temperature would take powers beyond all numbers.
    sizes = [math.log(count if cap is None else min(count, cap)) for count in counts]
    powers = [math.exp((size - max(sizes)) / temperature) for size in sizes]
    return tuple(power / sum(powers) for power in powers)


def _seed(seed: int, task: int) -> int:
    """That of one task's rows: tasks of one size must not be shuffled alike."""
    return int(np.random.SeedSequence([seed, _ROWS, task]).generate_state(1, np.uint64)[0])
