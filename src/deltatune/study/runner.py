"""Runs the cells that are not done yet, alone or with other processes on the same store."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from deltatune.study.cell import Cell, CellResult
from deltatune.study.store import Done, Failed, Store

__all__ = ["Event", "Execute", "Outcome", "Together", "Watch", "run"]

Execute: TypeAlias = Callable[[Cell], CellResult]


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell.

    Attributes:
        kind: "kept" (done or failed before, and not run now), "begun", "done", "failed" or
            "elsewhere" (in another process).
        cell: the cell.
        finished: cells of this call that are done or failed by now.
        total: cells of this call.
        result: of a cell that is done, now or before.
        error: of a cell that failed, now or before: its class and message.
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
    """What became of the cells, in this call or before it.

    Attributes:
        done: id -> result.
        failed: id -> record of the error.
    """

    done: dict[str, CellResult] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)


@dataclass(frozen=True)
class Together:
    """How several cells are run at once.

    Attributes:
        size: at most so many.
        base: what a cell shares with those that it can be run with; None: with none.
        execute: runs cells of one base, and calls its second argument with each that ends.
    """

    size: int
    base: Callable[[Cell], Hashable | None]
    execute: Callable[[Sequence[Cell], Callable[[Cell, CellResult | Exception], None]], None]


def run(
    cells: Iterable[Cell],
    execute: Execute,
    store: Store,
    *,
    together: Together | None = None,
    retry: bool | Mapping[str, Failed] = False,
    watch: Watch | None = None,
    patience: float = 1.0,
) -> Outcome:
    """Runs each cell once and returns the results of all, also of those done before or by others.

    An error ends its cell, is recorded, and the other cells go on. It is a result like any other:
    the cell is not run again unless that is asked for. What is interrupted (KeyboardInterrupt, a
    kill) has not failed: nothing is recorded. Cells that other processes are working on are waited
    for at the end; if such a process dies, its cell is taken over.

    Args:
        cells: to run; equal cells count once.
        execute: runs one cell.
        store: where results are looked up and recorded.
        together: runs several at once; None: each is run by itself.
        retry: whether cells that failed before this call are tried again, once; or, of several
            calls that are one piece of work, id -> the failure that stood before the first of them.
        watch: told of everything that happens.
        patience: seconds between looks at cells that other processes are working on.
    """
    report = _Reporter(0, watch or (lambda event: None))
    again = (store.failed() if retry else {}) if isinstance(retry, bool) else retry
    work = _Work(execute, store, together, report, again)
    work.waiting = {cell.id: cell for cell in cells}
    report.total = len(work.waiting)
    while work.waiting:
        if not work.pass_once():
            time.sleep(patience)
    return work.outcome


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


@dataclass
class _Work:
    """The cells that are left, and what became of the others."""

    execute: Execute
    store: Store
    together: Together | None
    report: _Reporter
    again: Mapping[str, Failed]
    waiting: dict[str, Cell] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)
    elsewhere: set[str] = field(default_factory=set)

    def pass_once(self) -> bool:
        """Goes once through the cells that are left; False if all were in other hands."""
        progress = False
        for cell in list(self.waiting.values()):
            if not self._open(cell):
                progress = progress or cell.id not in self.waiting
                continue
            if not self.store.claim(cell.id):
                if cell.id not in self.elsewhere:
                    self.report("elsewhere", cell)
                self.elsewhere.add(cell.id)
                continue
            progress = True
            group = [cell]
            try:
                group.extend(self._companions(cell))
                self._run_claimed(group)
            finally:
                for one in group:
                    self.store.release(one.id)
                    self.waiting.pop(one.id)
        return progress

    def _open(self, cell: Cell) -> bool:
        """Whether a cell is left to run; if nobody needs to run it, it is left no longer.

        The store is read again before each cell: with several processes it changes all the time.
        """
        if cell.id not in self.waiting:
            return False
        known = self._known(cell)
        if known is None:
            return True
        self._keep(self.waiting.pop(cell.id), known)
        return False

    def _known(self, cell: Cell) -> Done | Failed | None:
        """What became of a cell; None if it is to be run."""
        known = self.store.recorded().get(cell.id)
        return None if known == self.again.get(cell.id) else known

    def _companions(self, cell: Cell) -> Iterator[Cell]:
        """Claims further cells that can be run together with one."""
        if self.together is None or (base := self.together.base(cell)) is None:
            return
        left = self.together.size - 1
        for other in list(self.waiting.values()):
            if not left:
                return
            if other is not cell and self.together.base(other) == base and self._open(other):
                if not self.store.claim(other.id):
                    continue
                left -= 1
                yield other

    def _run_claimed(self, group: Sequence[Cell]) -> None:
        """Runs cells that this process has claimed and records what became of them."""
        open_cells = []
        for cell in group:
            known = self._known(cell)  # another process may have ended it just before the claim
            if known is None:
                open_cells.append(cell)
                self.report("begun", cell)
            else:
                self._keep(cell, known)
        if len(open_cells) > 1:
            self._run_together(open_cells)
        elif open_cells:
            self._record(open_cells[0], self._result(open_cells[0]))

    def _result(self, cell: Cell) -> CellResult | Exception:
        try:
            return self.execute(cell)
        except Exception as error:
            return error

    def _run_together(self, cells: Sequence[Cell]) -> None:
        assert self.together is not None
        try:
            self.together.execute(cells, self._record)
        except Exception as error:
            for cell in cells:
                if cell.id not in self.outcome.done and cell.id not in self.outcome.failed:
                    self._record(cell, error)

    def _keep(self, cell: Cell, known: Done | Failed) -> None:
        if isinstance(known, Done):
            self.outcome.done[cell.id] = known.result
            self.report("kept", cell, known.result)
        else:
            self.outcome.failed[cell.id] = known
            self.report("kept", cell, error=_in_short(known))

    def _record(self, cell: Cell, found: CellResult | Exception) -> None:
        if isinstance(found, CellResult):
            self.store.append(Done(id=cell.id, cell=cell, result=found))
            self.outcome.done[cell.id] = found
            self.report("done", cell, found)
            return
        record = Failed(
            id=cell.id,
            cell=cell,
            error=type(found).__name__,
            message=_writable(str(found)),
            trace=_writable("".join(traceback.format_exception(found))),
        )
        self.store.append(record)
        self.outcome.failed[cell.id] = record
        self.report("failed", cell, error=_in_short(record))


def _writable(text: str) -> str:
    """Names of files may hold bytes that are no text, and errors quote them."""
    return text.encode(errors="backslashreplace").decode()


def _in_short(record: Failed) -> str:
    return f"{record.error}: {record.message}"
