"""What `run` asks of a pool of workers, and gives it; without any process."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.study.killing import base_of, comparable, outcome_of, together
from tests.study.test_store import make_cell

from deltatune.core.errors import TrainingError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.runner import Event, Failure, Hands, Pool, Together, Told, run
from deltatune.study.status import status
from deltatune.study.store import MemoryStore


class Clerks(Pool):
    """Workers that are at work on so many groups at once, and end in any order."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.chance = size, random.Random(seed)
        self.hands: Hands | None = None
        self.groups: list[list[Cell]] = []
        self.under_way: list[tuple[Sequence[Cell], Told]] = []
        self.stopped = False
        self.most = 0

    def hire(self, hands: Hands, most: int) -> None:
        self.hands, self.most = hands, most

    def free(self) -> str | None:
        return f"host:{len(self.groups)}" if len(self.under_way) < self.size else None

    def submit(self, cells: Sequence[Cell], told: Told) -> None:
        assert len(self.under_way) < self.size, "nobody is free"
        self.groups.append(list(cells))
        self.under_way.append((cells, told))

    def wait(self, seconds: float) -> None:
        assert self.under_way and self.hands is not None, "nothing to wait for"
        cells, told = self.under_way.pop(self.chance.randrange(len(self.under_way)))
        told(self.hands(cells))

    def stop(self) -> None:
        self.stopped = True


@given(
    seeds=st.lists(st.integers(0, 30), max_size=20),
    workers=st.integers(1, 5),
    size=st.integers(1, 4),
    order=st.integers(0, 99),
)
def test_a_pool_gives_what_this_process_gives(
    seeds: list[int], workers: int, size: int, order: int
) -> None:
    cells = [make_cell(seed) for seed in seeds]
    store, pool, events = MemoryStore(), Clerks(workers, order), list[Event]()
    found = run(cells, outcome_of, store, together=together(size), pool=pool, watch=events.append)
    assert comparable(found) == comparable(
        run(cells, outcome_of, MemoryStore(), together=together(size))
    )
    ran = [cell.id for group in pool.groups for cell in group]
    assert sorted(ran) == sorted({cell.id for cell in cells}), "each is handed out once"
    assert len(store.records()) == len(ran) == pool.most and not store.claimed()
    for group in pool.groups:
        bases = {base_of(cell) for cell in group}
        assert len(group) <= size and len(bases) == 1
        assert len(group) == 1 or bases != {None}
    assert [event.finished for event in events if event.kind != "begun"] == [
        *range(1, len(ran) + 1)
    ]


def test_a_claim_names_the_worker_and_its_cell() -> None:
    class Looking(Clerks):
        def wait(self, seconds: float) -> None:
            found = status(store)
            seen.append({claim.cell: claim.worker for claim in found.running.values()})
            super().wait(seconds)

    seen: list[dict[str, str]] = []
    store, cells = MemoryStore(), [make_cell(1), make_cell(2)]
    run(cells, outcome_of, store, pool=Looking(2))
    assert seen[0] == {str(cells[0]): "host:0", str(cells[1]): "host:1"}
    assert len(seen[1]) == 1


def test_what_is_interrupted_is_stopped_and_free_again() -> None:
    class Interrupted(Clerks):
        def wait(self, seconds: float) -> None:
            raise KeyboardInterrupt

        def stop(self) -> None:
            assert len(store.claimed()) == 2, "nobody may take a cell before its worker has ended"
            super().stop()

    store, pool = MemoryStore(), Interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        run([make_cell(seed) for seed in range(3)], outcome_of, store, pool=pool)
    assert pool.stopped and not store.claimed() and not store.records()


def test_nobody_is_hired_for_nothing() -> None:
    pool = Clerks(1)
    run([], outcome_of, MemoryStore(), pool=pool)
    assert pool.hands is None


def test_a_cell_that_nobody_spoke_of_has_failed() -> None:
    def silent(cells: Sequence[Cell], told: object) -> None:
        return

    cells = [make_cell(0), make_cell(1)]
    found = run(cells, outcome_of, MemoryStore(), together=Together(2, lambda cell: 0, silent))
    assert {failure.error for failure in found.failed.values()} == {"StateError"}
    assert len(found.failed) == 2


def test_hands_say_what_an_error_said() -> None:
    def fails(cell: Cell) -> CellResult:
        raise TrainingError("The loss is not finite.")

    (failure,) = Hands(fails)([make_cell()])
    assert isinstance(failure, Failure)
    assert (failure.error, failure.message) == ("TrainingError", "The loss is not finite.")
    assert "in fails" in failure.trace
