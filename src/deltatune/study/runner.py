"""Runs the cells that are not done yet, alone or with other processes on the same store.

Who runs cells claims them, and records what became of them. Where they are carried out is another
matter: here, one group after the other, or in a `Pool` of workers.
"""

from __future__ import annotations

import abc
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from deltatune.core.errors import StateError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.machine import machine
from deltatune.study.store import Claim, Done, Failed, Store, this_process

__all__ = [
    "Event",
    "Execute",
    "Failure",
    "Hands",
    "Outcome",
    "Pool",
    "Together",
    "Told",
    "Watch",
    "run",
]

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


@dataclass(frozen=True)
class Failure:
    """The error that ended a cell, as texts: not every exception can be sent to another process.

    Attributes:
        error, message, trace: see `Failed`.
    """

    error: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Returns what is kept of an exception."""
        trace = "".join(traceback.format_exception(error))
        return cls(type(error).__name__, _writable(str(error)), _writable(trace))


Told: TypeAlias = Callable[[Cell, CellResult | Failure], None]


@dataclass(frozen=True)
class Hands:
    """Carries out cells, in whichever process it is.

    Attributes:
        execute: runs one cell.
        together: runs several at once.
    """

    execute: Execute
    together: Together | None = None

    def __call__(self, cells: Sequence[Cell], told: Told) -> None:
        """Carries out one cell, or several of one base, and tells of each when it ends. An error is
        what became of the cells that had not ended.
        """
        ended: set[str] = set()

        def end(cell: Cell, found: CellResult | Exception) -> None:
            told(cell, Failure.of(found) if isinstance(found, Exception) else _signed(found))
            ended.add(cell.id)

        try:
            if len(cells) > 1 and self.together is not None:
                self.together.execute(cells, end)
            else:
                for cell in cells:
                    end(cell, self._result(cell))
            error: Exception = StateError("The run ended and said nothing of this cell.")
        except Exception as found:
            error = found
        for cell in cells:
            if cell.id not in ended:
                end(cell, error)

    def _result(self, cell: Cell) -> CellResult | Exception:
        try:
            return self.execute(cell)
        except Exception as error:
            return error


def _signed(result: CellResult) -> CellResult:
    """The result, with the machine that this is."""
    return result.model_copy(update={"machine": machine(result.device)})


class Pool(abc.ABC):
    """Workers that carry out groups of cells. It knows nothing of stores.

    `run` hires, then submits a group whenever a worker is free, and waits in between.
    """

    @abc.abstractmethod
    def hire(self, hands: Hands, most: int) -> None:
        """Gets at most so many workers ready. Those that have these hands already stay."""

    @abc.abstractmethod
    def free(self) -> str | None:
        """Returns "host:process" of the worker that takes the next group; None: all are at work."""

    @abc.abstractmethod
    def submit(self, cells: Sequence[Cell], told: Told) -> None:
        """Gives the worker that is free a group. `told` is called with each of its cells, once,
        within this call or a later one of `wait`.
        """

    @abc.abstractmethod
    def wait(self, seconds: float) -> None:
        """Returns when something has changed, or so much later."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Breaks off the groups that are under way; nobody is told of them."""


class _Here(Pool):
    """This process: a group is over when it has been submitted."""

    def hire(self, hands: Hands, most: int) -> None:
        self._hands = hands

    def free(self) -> str:
        return this_process()

    def submit(self, cells: Sequence[Cell], told: Told) -> None:
        self._hands(cells, told)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self) -> None:
        """Nothing is under way."""


def run(
    cells: Iterable[Cell],
    execute: Execute,
    store: Store,
    *,
    together: Together | None = None,
    pool: Pool | None = None,
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
        pool: where they are run; None: in this process.
        retry: whether cells that failed before this call are tried again, once; or, of several
            calls that are one piece of work, id -> the failure that stood before the first of them.
        watch: told of everything that happens.
        patience: seconds between looks at cells that other processes are working on.
    """
    report = _Reporter(0, watch or (lambda event: None))
    again = (store.failed() if retry else {}) if isinstance(retry, bool) else retry
    work = _Work(pool or _Here(), store, together, report, again, patience)
    work.waiting = {cell.id: cell for cell in cells}
    report.total = len(work.waiting)
    if work.waiting:
        work.pool.hire(Hands(execute, together), report.total)
    work.go()
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
    """The cells that are left, and what became of the others.

    Attributes:
        waiting: cells that have not ended, by id.
        held: of them, those that this process has claimed.
        elsewhere: ids of those that were seen in other hands.
    """

    pool: Pool
    store: Store
    together: Together | None
    report: _Reporter
    again: Mapping[str, Failed]
    patience: float
    waiting: dict[str, Cell] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    outcome: Outcome = field(default_factory=Outcome)
    elsewhere: set[str] = field(default_factory=set)

    def go(self) -> None:
        """Runs what is left. Whatever breaks it off, no claim stays."""
        try:
            while self.waiting:
                if not self._pass_once():
                    self.pool.wait(self.patience)
        finally:
            if self.held:
                self.pool.stop()
            for cell_id in self.held:
                self.store.release(cell_id)

    def _pass_once(self) -> bool:
        """Goes once through the cells that are left; False if all are in hands already."""
        progress = False
        for cell in list(self.waiting.values()):
            if cell.id in self.held:
                continue
            if not self._open(cell):
                progress = True
                continue
            while (worker := self.pool.free()) is None:
                self.pool.wait(self.patience)
            if not self._claim(cell, worker):
                if cell.id not in self.elsewhere:
                    self.report("elsewhere", cell)
                self.elsewhere.add(cell.id)
                continue
            progress = True
            self._begin([cell, *self._companions(cell, worker)])
        return progress

    def _claim(self, cell: Cell, worker: str) -> bool:
        if not self.store.claim(cell.id, Claim(worker, str(cell))):
            return False
        self.held.add(cell.id)
        return True

    def _let_go(self, cell: Cell) -> None:
        """Gives back a cell that has ended."""
        del self.waiting[cell.id]
        self.held.remove(cell.id)
        self.store.release(cell.id)

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

    def _companions(self, cell: Cell, worker: str) -> Iterator[Cell]:
        """Claims further cells that can be run together with one."""
        if self.together is None or (base := self.together.base(cell)) is None:
            return
        left = self.together.size - 1
        for other in list(self.waiting.values()):
            if not left:
                return
            if other.id in self.held or self.together.base(other) != base:
                continue
            if self._open(other) and self._claim(other, worker):
                left -= 1
                yield other

    def _begin(self, group: Sequence[Cell]) -> None:
        """Hands out cells that this process has claimed."""
        open_cells = []
        for cell in group:
            known = self._known(cell)  # another process may have ended it just before the claim
            if known is None:
                open_cells.append(cell)
                self.report("begun", cell)
            else:
                self._keep(cell, known)
                self._let_go(cell)
        if open_cells:
            self.pool.submit(open_cells, self._end)

    def _end(self, cell: Cell, found: CellResult | Failure) -> None:
        self._record(cell, found)
        self._let_go(cell)

    def _keep(self, cell: Cell, known: Done | Failed) -> None:
        if isinstance(known, Done):
            self.outcome.done[cell.id] = known.result
            self.report("kept", cell, known.result)
        else:
            self.outcome.failed[cell.id] = known
            self.report("kept", cell, error=_in_short(known))

    def _record(self, cell: Cell, found: CellResult | Failure) -> None:
        if isinstance(found, CellResult):
            self.store.append(Done(id=cell.id, cell=cell, result=found))
            self.outcome.done[cell.id] = found
            self.report("done", cell, found)
            return
        record = Failed(id=cell.id, cell=cell, **asdict(found))
        self.store.append(record)
        self.outcome.failed[cell.id] = record
        self.report("failed", cell, error=_in_short(record))


def _writable(text: str) -> str:
    """Names of files may hold bytes that are no text, and errors quote them."""
    return text.encode(errors="backslashreplace").decode()


def _in_short(record: Failed) -> str:
    return f"{record.error}: {record.message}"
