from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.study.fake import execute
from tests.study.killing import comparable, outcome_of, together
from tests.study.test_store import make_cell

from deltatune.core.errors import ConfigurationError, TrainingError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.runner import Event, Together, run
from deltatune.study.store import Claim, Done, Failed, JournalStore, MemoryStore

ROOT = Path(__file__).resolve().parents[2]


def test_each_cell_is_run_once() -> None:
    store, calls = MemoryStore(), []

    def counted(cell: Cell) -> CellResult:
        calls.append(cell.id)
        return execute(cell)

    cells = [make_cell(seed) for seed in (0, 1, 0, 2)]
    first = run(cells, counted, store)
    again = run([*cells, make_cell(3)], counted, store)
    assert len(calls) == len(set(calls)) == 4
    assert len(first.done) == 3 and len(again.done) == 4
    assert again.done[make_cell(1).id] == execute(make_cell(1))


def test_cells_of_one_base_are_run_together() -> None:
    """Seeds of one parity share a base; 4 is alone with nobody, and 6 fails by itself."""
    groups: list[list[int]] = []

    def many(cells: Sequence[Cell], told: Callable[[Cell, CellResult | Exception], None]) -> None:
        groups.append([cell.seed for cell in cells])
        for cell in reversed(cells):
            told(cell, TrainingError("not finite") if cell.seed == 6 else execute(cell))

    def base(cell: Cell) -> int | None:
        return None if cell.seed == 4 else cell.seed % 2

    store, events = MemoryStore(), list[Event]()
    cells = [make_cell(seed) for seed in range(10)]
    store.claim(make_cell(5).id)  # another process has it, and is done soon
    store.append(Done(id=make_cell(8).id, cell=make_cell(8), result=execute(make_cell(8))))

    def watch(event: Event) -> None:
        events.append(event)
        if event.cell.seed == 9 and event.kind == "done":
            store.append(Done(id=make_cell(5).id, cell=make_cell(5), result=execute(make_cell(5))))

    outcome = run(cells, execute, store, together=Together(3, base, many), watch=watch)
    # 4 is alone, 8 was done before; 1 and 3 wait for 5, which is of their group.
    assert groups == [[0, 2, 6], [7, 9], [1, 3]]
    assert set(outcome.done) == {make_cell(seed).id for seed in (0, 1, 2, 3, 4, 5, 7, 8, 9)}
    assert [record.cell.seed for record in outcome.failed.values()] == [6]
    assert len([event for event in events if event.kind == "begun"]) == 8


@given(
    seeds=st.lists(st.integers(0, 30), max_size=20),
    size=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 12), max_size=5),
)
def test_a_group_that_was_cut_off_is_run_again_as_the_same(
    seeds: list[int], size: int, cuts: list[int]
) -> None:
    """However often it is interrupted, and wherever: what a cell gives shows whom it was with."""
    cells, store = [make_cell(seed) for seed in seeds], MemoryStore()
    whole = run(cells, outcome_of, MemoryStore(), together=together(size))
    for cut in cuts:
        left = iter(range(cut))

        def counted(cell: Cell, group: Sequence[Cell] = (), left: Any = left) -> CellResult:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return outcome_of(cell, group)

        with suppress(KeyboardInterrupt):
            run(cells, counted, store, together=together(size, counted))
        assert not store.claimed()
    outcome = run(cells, outcome_of, store, together=together(size))
    assert comparable(outcome) == comparable(whole)
    assert len(store.records()) == len({cell.id for cell in cells})


def test_an_error_of_all_ends_those_that_are_left() -> None:
    def many(cells: Sequence[Cell], told: Callable[[Cell, CellResult | Exception], None]) -> None:
        told(cells[0], execute(cells[0]))
        raise ConfigurationError("they do not fit into memory")

    cells = [make_cell(seed) for seed in range(3)]
    outcome = run(cells, execute, MemoryStore(), together=Together(3, lambda cell: 0, many))
    assert set(outcome.done) == {cells[0].id}
    assert set(outcome.failed) == {cells[1].id, cells[2].id}


def test_an_error_ends_its_cell_only_and_stays_until_it_is_tried_again() -> None:
    store, calls = MemoryStore(), list[int]()
    broken = True

    def sometimes(cell: Cell) -> CellResult:
        calls.append(cell.seed)
        if broken and cell.seed == 1:
            raise TrainingError("The loss is not finite at step 3.")
        if broken and cell.seed == 2:
            raise ZeroDivisionError("a fault of ours")
        return execute(cell)

    events: list[Event] = []
    cells = [make_cell(seed) for seed in range(4)]
    outcome = run(cells, sometimes, store, watch=events.append)
    assert set(outcome.done) == {make_cell(0).id, make_cell(3).id}
    assert {f.error for f in outcome.failed.values()} == {"TrainingError", "ZeroDivisionError"}
    errors = [
        "TrainingError: The loss is not finite at step 3.",
        "ZeroDivisionError: a fault of ours",
    ]
    assert [e.error for e in events if e.kind == "failed"] == errors
    assert [e.finished for e in events if e.kind != "begun"] == [1, 2, 3, 4]
    assert all("in sometimes" in record.trace for record in store.failed().values())
    broken = False
    events.clear()
    kept = run(cells, sometimes, store, watch=events.append)
    assert kept == outcome and len(calls) == 4, "nothing is run again unasked"
    assert {e.kind for e in events} == {"kept"} and [e.finished for e in events] == [1, 2, 3, 4]
    assert [e.error for e in events if e.result is None] == errors
    again = run(cells, sometimes, store, retry=True)
    assert len(again.done) == 4 and not again.failed and not store.failed()
    assert calls == [0, 1, 2, 3, 1, 2], "what was done is not run again either"


def test_what_fails_again_is_not_tried_forever() -> None:
    store, calls = MemoryStore(), list[int]()

    def never(cell: Cell) -> CellResult:
        calls.append(cell.seed)
        raise TrainingError(f"attempt {len(calls)}")

    run([make_cell()], never, store)
    stood = store.failed()
    first = run([make_cell()], never, store, retry=stood)
    second = run([make_cell()], never, store, retry=stood)  # a second part of the same work
    assert len(calls) == 2 and first == second
    assert store.failed()[make_cell().id].message == "attempt 2"


def test_failures_of_a_group_stay_too() -> None:
    groups: list[list[int]] = []

    def many(cells: Sequence[Cell], told: Callable[[Cell, CellResult | Exception], None]) -> None:
        groups.append([cell.seed for cell in cells])
        for cell in cells:
            told(cell, TrainingError("no") if cell.seed == 1 else execute(cell))

    store, together = MemoryStore(), Together(8, lambda cell: 0, many)
    for cells in (3, 5):
        outcome = run([make_cell(seed) for seed in range(cells)], execute, store, together=together)
    assert groups == [[0, 1, 2], [3, 4]] and set(outcome.failed) == {make_cell(1).id}
    run([make_cell(1), make_cell(5)], execute, store, together=together, retry=True)
    assert groups[2:] == [[1, 5]]


def test_a_failure_of_another_process_just_before_the_claim_is_kept() -> None:
    class Late(MemoryStore):
        def claim(self, cell_id: str, claim: Claim | None = None) -> bool:
            self.append(Failed(id=cell_id, cell=make_cell(), error="E", message="no"))
            return super().claim(cell_id, claim)

    events: list[Event] = []
    outcome = run([make_cell()], execute, Late(), watch=events.append)
    assert set(outcome.failed) == {make_cell().id}
    assert [event.kind for event in events] == ["kept"]


def test_errors_that_are_no_text_are_recorded(tmp_path: Path) -> None:
    def fails(cell: Cell) -> CellResult:
        raise OSError("no file \udcff")

    run([make_cell()], fails, JournalStore(tmp_path))
    assert JournalStore(tmp_path).failed()[make_cell().id].message == "no file \\udcff"


@pytest.mark.parametrize("size", [1, 2])
def test_an_interrupt_ends_the_run_and_frees_the_cells(size: int) -> None:
    store = MemoryStore()

    def interrupted(*arguments: object) -> CellResult:
        raise KeyboardInterrupt

    cells = [make_cell(seed) for seed in range(2)]
    together = Together(size, lambda cell: 0, lambda cells, told: interrupted() and None)
    with pytest.raises(KeyboardInterrupt):
        run(cells, interrupted, store, together=together)
    assert all(store.claim(cell.id) for cell in cells)
    assert not store.records()


def test_a_cell_of_another_process_is_waited_for(tmp_path: Path) -> None:
    mine, theirs = JournalStore(tmp_path), JournalStore(tmp_path)
    assert theirs.claim(make_cell(0).id)
    events: list[Event] = []

    def watch(event: Event) -> None:
        events.append(event)
        if event.kind == "done":  # when we are through with our own, the other one finishes
            run([make_cell(0)], execute, JournalStore(tmp_path / "other"))
            other = JournalStore(tmp_path / "other").done()[make_cell(0).id]
            theirs.append(other)
            theirs.release(make_cell(0).id)

    outcome = run([make_cell(0), make_cell(1)], execute, mine, watch=watch, patience=0.01)
    assert [e.kind for e in events] == ["elsewhere", "begun", "done", "kept"]
    assert len(outcome.done) == 2


WORKER = """
import sys, time
from tests.study.fake import execute
from tests.study.test_store import make_cell
from deltatune.study.runner import run
from deltatune.study.store import JournalStore

def slow(cell):
    print(cell.seed, flush=True)
    time.sleep(float(sys.argv[2]))
    return execute(cell)

run([make_cell(seed) for seed in range(8)], slow, JournalStore(sys.argv[1]), patience=0.02)
"""


def worker(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_processes_share_the_work_and_outlive_each_other(tmp_path: Path) -> None:
    doomed = worker(tmp_path, 60)
    assert doomed.stdout is not None
    assert doomed.stdout.readline() == "0\n"
    others = [worker(tmp_path, 0.01) for _ in range(2)]
    os.kill(doomed.pid, signal.SIGKILL)
    ran = [other.communicate()[0].split() for other in others]
    doomed.communicate()
    assert sorted(ran[0] + ran[1]) == [str(seed) for seed in range(8)]
    assert len(JournalStore(tmp_path).done()) == 8
