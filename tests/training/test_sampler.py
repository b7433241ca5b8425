from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from deltatune.training.sampler import Sampler, epoch_batches

SIZES = st.integers(1, 200)
BATCHES = st.integers(1, 9)
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=300)


@given(SIZES, BATCHES, st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_every_row_comes_once_in_an_epoch(count: int, size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(count, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert sum(len(batch) != size for batch in batches) <= 1
    assert len(batches) == Sampler(count, size, seed).batches_per_epoch


@given(LENGTHS, BATCHES, st.integers(0, 99), st.integers(0, 9))
def test_grouping_by_length_loses_nothing(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(len(lengths), size, seed, epoch, lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert batches == epoch_batches(len(lengths), size, seed, epoch, lengths)
    assert len(batches) == Sampler(len(lengths), size, seed, lengths).batches_per_epoch


@given(LENGTHS, BATCHES, st.integers(0, 99))
def test_grouping_by_length_never_pads_more(lengths: list[int], size: int, seed: int) -> None:
    """Within one mega-batch: sorting minimises the sum of the longest of each batch."""

    def longest(batches: list[list[int]]) -> int:
        return sum(max(lengths[row] for row in batch) for batch in batches)

    one_mega_batch = lengths[: 50 * size]
    count = len(one_mega_batch) // size * size or 1
    grouped = epoch_batches(count, size, seed, 0, one_mega_batch[:count])
    assert longest(grouped) <= longest(epoch_batches(count, size, seed, 0))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_batches(50, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


@given(SIZES, BATCHES, st.integers(0, 20), st.integers(0, 70))
def test_a_restored_sampler_goes_on_alike(count: int, size: int, seed: int, taken: int) -> None:
    first, second = Sampler(count, size, seed), Sampler(count, size, seed)
    for _ in range(taken):
        next(first)
    second.restore(first.epoch, first.index)
    assert [*islice(first, 30)] == [*islice(second, 30)]
    assert (first.epoch, first.index) == (second.epoch, second.index)


def test_an_epoch_begins_where_the_last_ended() -> None:
    sampler = Sampler(5, 2, 0)
    whole = epoch_batches(5, 2, 0, 0) + epoch_batches(5, 2, 0, 1)
    assert [*islice(sampler, 6)] == whole
    assert (sampler.epoch, sampler.index) == (1, 3)
