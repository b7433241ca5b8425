"""Runs the cells that are not done yet, alone or with other processes on the same store.

Who runs cells claims them, and records what became of them. Where they are carried out is another
matter: here, one group after the other, or in a `Pool` of workers.

A group is cells that are run at once, or one by itself. Which they are follows from the cells
alone, and what became of them is recorded together: a group that was cut off is run again as the
same one, and gives the same results.
"""

from __future__ import annotations

import abc
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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


Found: TypeAlias = CellResult | Failure
Told: TypeAlias = Callable[[Sequence[Found]], None]


@dataclass(frozen=True)
class Hands:
    """Carries out groups, in whichever process it is.

    Attributes:
        execute: runs one cell.
        together: runs several at once.
    """

    execute: Execute
    together: Together | None = None

    def __call__(self, cells: Sequence[Cell]) -> list[Found]:
        """Carries out one cell, or several of one base, and returns what became of each. An error
        is what became of the cells that had not ended.
        """
        found: dict[str, Found] = {}

        def end(cell: Cell, what: CellResult | Exception) -> None:
            found[cell.id] = Failure.of(what) if isinstance(what, Exception) else _signed(what)

        error: Exception = StateError("The run ended and said nothing of this cell.")
        try:
            if len(cells) > 1 and self.together is not None:
                self.together.execute(cells, end)
            else:
                for cell in cells:
                    end(cell, self._result(cell))
        except Exception as other:
            error = other
        return [found.get(cell.id) or Failure.of(error) for cell in cells]

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
        """Gives the worker that is free a group. `told` is called once with what became of its
        cells, in their order, within this call or a later one of `wait`.
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
        told(self._hands(cells))

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
    kill) has not failed: nothing of its group is recorded. Cells that other processes are working
    on are waited for at the end; if such a process dies, its cells are taken over.

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
    waiting = {cell.id: cell for cell in cells}
    groups = _groups(waiting.values(), together)
    work = _Work(pool or _Here(), store, report, again, patience, groups, waiting)
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


def _groups(cells: Iterable[Cell], together: Together | None) -> list[list[Cell]]:
    """Groups the cells: in their order, as many of one base as may be run together.

    Neither what is done already nor who else is at work has a part in it.
    """
    groups: list[list[Cell]] = []
    last: dict[Hashable, list[Cell]] = {}  # of each base
    for cell in cells:
        base = None if together is None else together.base(cell)
        if together is not None and base in last and len(last[base]) < together.size:
            last[base].append(cell)
            continue
        groups.append([cell])
        if base is not None:
            last[base] = groups[-1]
    return groups


@dataclass
class _Work:
    """The cells that are left, and what became of the others.

    Attributes:
        groups: of all cells.
        waiting: cells that have not ended, by id.
        held: of them, those that this process has claimed.
        elsewhere: ids of those that were seen in other hands.
    """

    pool: Pool
    store: Store
    report: _Reporter
    again: Mapping[str, Failed]
    patience: float
    groups: list[list[Cell]]
    waiting: dict[str, Cell]
    held: dict[str, Cell] = field(default_factory=dict)
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
            self._let_go(self.held.values())

    def _pass_once(self) -> bool:
        """Goes once through the groups that are left; False if all are in hands already."""
        progress = False
        for group in self.groups:
            if any(cell.id in self.held for cell in group):
                continue
            waiting = [cell for cell in group if cell.id in self.waiting]
            if not (left := self._left(waiting)):
                progress |= bool(waiting)
                continue
            while (worker := self.pool.free()) is None:
                self.pool.wait(self.patience)
            progress |= self._begin(left, worker)
        return progress

    def _left(self, group: Sequence[Cell]) -> list[Cell]:
        """The cells of a group that are still to be run; the others are waited for no longer.

        The store is read again before each group: with several processes it changes all the time.
        """
        for cell in group:
            if (known := self._known(cell)) is not None:
                self._keep(self.waiting.pop(cell.id), known)
        return [cell for cell in group if cell.id in self.waiting]

    def _known(self, cell: Cell) -> Done | Failed | None:
        """What became of a cell; None if it is to be run."""
        known = self.store.recorded().get(cell.id)
        return None if known == self.again.get(cell.id) else known

    def _begin(self, cells: Sequence[Cell], worker: str) -> bool:
        """Hands out a group, whole; False if another process is working on it."""
        if not self._claim(cells, worker):
            for cell in cells:
                if cell.id not in self.elsewhere:
                    self.report("elsewhere", cell)
            self.elsewhere.update(cell.id for cell in cells)
            return False
        if any(self._known(cell) is not None for cell in cells):
            self._let_go(cells)  # another process was through before the claim
            return True
        for cell in cells:
            self.report("begun", cell)
        self.pool.submit(cells, lambda found: self._end(cells, found))
        return True

    def _claim(self, cells: Sequence[Cell], worker: str) -> bool:
        """Claims all cells of a group or none, in an order that every process keeps to."""
        for cell in sorted(cells, key=lambda cell: cell.id):
            if not self.store.claim(cell.id, Claim(worker, str(cell))):
                self._let_go(cells)
                return False
            self.held[cell.id] = cell
        return True

    def _let_go(self, cells: Iterable[Cell]) -> None:
        """Gives back those of the cells that are held."""
        for cell_id in {cell.id for cell in cells} & set(self.held):
            self.store.release(cell_id)
            del self.held[cell_id]

    def _end(self, cells: Sequence[Cell], found: Sequence[Found]) -> None:
        """Records a group, and gives its cells back."""
        records = [_record(cell, one) for cell, one in zip(cells, found, strict=True)]
        self.store.append(*records)
        for record in records:
            self._keep(record.cell, record, new=True)
            del self.waiting[record.id]
        self._let_go(cells)

    def _keep(self, cell: Cell, known: Done | Failed, *, new: bool = False) -> None:
        if isinstance(known, Done):
            self.outcome.done[cell.id] = known.result
            self.report("done" if new else "kept", cell, known.result)
        else:
            self.outcome.failed[cell.id] = known
            error = f"{known.error}: {known.message}"
            self.report("failed" if new else "kept", cell, error=error)


def _record(cell: Cell, found: Found) -> Done | Failed:
    if isinstance(found, Failure):
        return Failed(id=cell.id, cell=cell, **asdict(found))
    return Done(id=cell.id, cell=cell, result=found)


def _writable(text: str) -> str:
    """Names of files may hold bytes that are no text, and errors quote them."""
    return text.encode(errors="backslashreplace").decode()
