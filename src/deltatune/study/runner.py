"""Runs the cells that are not done yet, alone or with other processes on the same store."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from deltatune.core.errors import DeltatuneError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.store import Done, Failed, Store

__all__ = ["Event", "Execute", "Outcome", "Watch", "run"]

Execute: TypeAlias = Callable[[Cell], CellResult]


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell.

    Attributes:
        kind: "kept" (done before), "begun", "done", "failed" or "elsewhere" (in another process).
        cell: the cell.
        finished: cells of this call that are done or failed by now.
        total: cells of this call.
        result: of a cell that is kept or done.
        error: of a cell that failed, one line.
    """

    kind: Literal["kept", "begun", "done", "failed", "elsewhere"]
    cell: Cell
    finished: int
    total: int
    result: CellResult | None = None
    error: str | None = None


Watch: TypeAlias = Callable[[Event], None]


@dataclass
class Outcome:
    """What became of the cells: id -> result, and id -> record of the error."""

    done: dict[str, CellResult] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)


def run(
    cells: Iterable[Cell],
    execute: Execute,
    store: Store,
    *,
    watch: Watch | None = None,
    patience: float = 1.0,
) -> Outcome:
    """Runs each cell once and returns the results of all, also of those done before or by others.

    An error ends its cell, is recorded, and the other cells go on. A cell that failed in an earlier
    call is tried again. Cells that other processes are working on are waited for at the end; if
    such a process dies, its cell is taken over.

    Args:
        cells: to run; equal cells count once.
        execute: runs one cell.
        store: where results are looked up and recorded.
        watch: told of everything that happens.
        patience: seconds between looks at cells that other processes are working on.
    """
    waiting = {cell.id: cell for cell in cells}
    report = _Reporter(len(waiting), watch or (lambda event: None))
    failed_before = store.failed()
    outcome = Outcome()
    announced: set[str] = set()
    while waiting:
        progress = False
        for cell in _settled(waiting, store, failed_before, outcome, report):
            if not store.claim(cell.id):
                if cell.id not in announced:
                    report("elsewhere", cell)
                announced.add(cell.id)
                continue
            progress = True
            try:
                _run_claimed(cell, execute, store, outcome, report)
            finally:
                store.release(cell.id)
            waiting.pop(cell.id)
        if waiting and not progress:
            time.sleep(patience)
    return outcome


class _Reporter:
    """Counts what is finished and tells the watcher."""

    def __init__(self, total: int, watch: Watch) -> None:
        self.total, self.finished, self.watch = total, 0, watch

    def __call__(
        self,
        kind: Literal["kept", "begun", "done", "failed", "elsewhere"],
        cell: Cell,
        result: CellResult | None = None,
        error: str | None = None,
    ) -> None:
        if kind in ("kept", "done", "failed"):
            self.finished += 1
        self.watch(Event(kind, cell, self.finished, self.total, result, error))


def _settled(
    waiting: dict[str, Cell],
    store: Store,
    failed_before: dict[str, Failed],
    outcome: Outcome,
    report: _Reporter,
) -> Iterator[Cell]:
    """Yields the cells that nobody has run; takes out of `waiting` those that someone has.

    The store is read again before each cell: with several processes it changes all the time.
    """
    for cell_id, cell in list(waiting.items()):
        done = store.done().get(cell_id)
        failed = store.failed().get(cell_id)
        if done is not None:
            outcome.done[cell_id] = done.result
            report("kept", waiting.pop(cell_id), done.result)
        elif failed is not None and failed != failed_before.get(cell_id):
            outcome.failed[cell_id] = failed
            report("failed", waiting.pop(cell_id), error=f"{failed.error}: {failed.message}")
        else:
            yield cell


def _run_claimed(
    cell: Cell, execute: Execute, store: Store, outcome: Outcome, report: _Reporter
) -> None:
    """Runs one cell that this process has claimed and records what became of it."""
    if (done := store.done().get(cell.id)) is not None:  # by another process, just before the claim
        outcome.done[cell.id] = done.result
        report("kept", cell, done.result)
        return
    report("begun", cell)
    try:
        result = execute(cell)
    except Exception as error:
        known = isinstance(error, DeltatuneError)
        record = Failed(
            id=cell.id,
            cell=cell,
            error=type(error).__name__,
            message=str(error),
            trace="" if known else traceback.format_exc(),
        )
        store.append(record)
        outcome.failed[cell.id] = record
        report("failed", cell, error=f"{record.error}: {record.message}")
    else:
        store.append(Done(id=cell.id, cell=cell, result=result))
        outcome.done[cell.id] = result
        report("done", cell, result)
