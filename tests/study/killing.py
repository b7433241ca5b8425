"""One round of the kill test: processes that share a journal and are killed, and what must hold.

A round follows from its number, but for the moments at which the kills fall.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from tests.study.fake import draw, execute
from tests.study.test_store import make_cell

from deltatune.core.errors import TrainingError
from deltatune.study import store as journal
from deltatune.study.cell import Cell, CellResult, Point
from deltatune.study.runner import Outcome, Together, run
from deltatune.study.store import JournalStore, MemoryStore

# Forked: a worker begins at once, without a second of imports. Nothing here has threads.
PROCESSES = multiprocessing.get_context("fork")
EXECUTIONS = "executions.jsonl"
PATIENCE = 120.0  # seconds until a worker that should have ended counts as stuck


@dataclass(frozen=True)
class Plan:
    """What a round does.

    Attributes:
        cells: so many.
        workers: processes at a time.
        together: cells that a worker runs at once at most.
        kills: from outside, at most: there are fewer when the cells are done before.
    """

    number: int
    cells: int
    workers: int
    together: int
    kills: int

    @classmethod
    def of(cls, number: int) -> Plan:
        """Returns the plan of a round."""
        random_numbers = random.Random(number)
        return cls(
            number=number,
            cells=random_numbers.randint(30, 60),
            workers=2 + number % 3,
            together=(1, 4, 3)[number // 3 % 3],
            kills=random_numbers.randint(4, 16),
        )


@dataclass(frozen=True)
class Tally:
    """What a round did.

    Attributes:
        cells: of the round.
        failed: cells of these whose outcome is an error.
        processes: that were started.
        kills: of them, from outside and in the middle of a line.
        torn: kills in the middle of a line.
        executions: of cells; those beyond one for each cell were cut off by a kill.
        seconds: that the round took.
    """

    cells: int
    failed: int
    processes: int
    kills: int
    torn: int
    executions: int
    seconds: float


def cells_of(plan: Plan) -> list[Cell]:
    """Returns the cells of a round."""
    return [make_cell(1000 * plan.number + place) for place in range(plan.cells)]


def outcome_of(cell: Cell, group: Sequence[Cell] = ()) -> CellResult:
    """What a cell gives, wherever and whenever it is run: one in five an error, one in five a long
    line of the journal, which a kill can tear. Which cells it is run with, if any, shows in it, as
    the order of sums does.
    """
    kind = draw("kind", cell.seed)
    if kind < 0.2:
        raise TrainingError(f"The loss of seed {cell.seed} is not finite.")
    result = execute(cell)
    result = result.model_copy(update={"measured": {"group": draw([one.id for one in group])}})
    if kind > 0.8:
        curve = tuple(Point(step=n, seconds=n / 7, loss=draw(n)) for n in range(1000))
        result = result.model_copy(update={"curve": curve})
    return result


def found(outcome: Callable[..., CellResult], cell: Cell, group: Sequence[Cell]) -> Any:
    """What becomes of a cell in a group: a result or an error."""
    try:
        return outcome(cell, group)
    except TrainingError as error:
        return error


def together(size: int, outcome: Callable[..., CellResult] = outcome_of) -> Together | None:
    """Runs groups at once, and takes no time."""

    def execute(cells: Sequence[Cell], told: Callable[[Cell, Any], None]) -> None:
        for cell in reversed(cells):
            told(cell, found(outcome, cell, cells))

    return Together(size, base_of, execute) if size > 1 else None


def seconds_of(cell: Cell) -> float:
    """How long a cell takes: 2 to 50 ms."""
    return 0.002 + 0.048 * draw("seconds", cell.seed)


def base_of(cell: Cell) -> int | None:
    """What a cell shares: a third of them nothing."""
    return cell.seed % 3 or None


class Worker:
    """A process that runs the cells of a round; every execution is noted before it begins."""

    def __init__(self, folder: Path, plan: Plan, number: int, *, last: bool = False) -> None:
        self.folder, self.plan, self.number, self.last = folder, plan, number, last

    def __call__(self) -> None:
        """Runs all cells. Ends with an error if what comes out is not what an uninterrupted run
        gives.
        """
        if not self.last and draw("torn", self.plan.number, self.number) < 0.25:
            _die_in_the_middle_of_line(1 + self.number % 4)
        store = JournalStore(self.folder)
        size = self.plan.together
        outcome = run(
            cells_of(self.plan),
            self.execute,
            store,
            together=Together(size, base_of, self.execute_together) if size > 1 else None,
            patience=0.02,
        )
        assert comparable(outcome) == comparable(uninterrupted(self.plan))

    def execute(self, cell: Cell) -> CellResult:
        self._begin(cell)
        time.sleep(seconds_of(cell))
        return outcome_of(cell)

    def execute_together(
        self, cells: Sequence[Cell], told: Callable[[Cell, CellResult | Exception], None]
    ) -> None:
        for cell in cells:
            self._begin(cell)
        for cell in reversed(cells):
            time.sleep(seconds_of(cell))
            told(cell, found(outcome_of, cell, cells))

    def _begin(self, cell: Cell) -> None:
        """Notes an execution in one write, and whether the journal holds the cell already; the
        journal is read here without the help of the store that is tested.
        """
        path = self.folder / "journal.jsonl"
        content = path.read_bytes() if path.exists() else b""
        recorded = f'"id":"{cell.id}"'.encode() in content[: content.rfind(b"\n") + 1]
        line = json.dumps({"id": cell.id, "worker": self.number, "recorded": recorded})
        with open(self.folder / EXECUTIONS, "ab", buffering=0) as file:
            file.write(line.encode() + b"\n")


def _die_in_the_middle_of_line(number: int) -> None:
    """Lets this process kill itself when half of its line of that number is written."""
    written = 0
    whole = journal._write_all

    def torn(file: IO[bytes], data: bytes) -> None:
        nonlocal written
        written += 1
        if written == number:
            whole(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(file, data)

    journal._write_all = torn


def uninterrupted(plan: Plan) -> Outcome:
    """Returns what one process gives that nobody kills."""
    return run(cells_of(plan), outcome_of, MemoryStore(), together=together(plan.together))


def comparable(outcome: Outcome) -> tuple[Any, Any]:
    """Returns the results and errors of an outcome, without who wrote them and when."""
    errors = {key: (found.error, found.message) for key, found in outcome.failed.items()}
    return outcome.done, errors


class Round:
    """A round in a folder of its own."""

    def __init__(self, number: int, folder: Path) -> None:
        self.plan, self.folder = Plan.of(number), folder
        self.processes: list[BaseProcess] = []
        self.shot: set[int] = set()
        self.chance = random.Random(number)

    def play(self) -> Tally:
        """Kills, restarts to the end, checks. Raises AssertionError for what does not hold."""
        started = time.perf_counter()
        reader = JournalStore(self.folder)
        for _ in range(self.plan.workers):
            self._start()
        while len(self.shot) < self.plan.kills and (alive := self._alive()):
            self._kill(self.chance.choice(alive))
            reader.records()  # whoever reads meanwhile sees whole records
            if self.chance.random() < 0.8:
                self._start()
        last = [self._start(last=True) for _ in range(self.plan.workers)]
        for process in self.processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in self.processes]
        assert {codes[number] for number in last} == {0}, f"exit codes {codes}"
        assert set(codes) <= {0, -signal.SIGKILL}, f"exit codes {codes}"
        killed = {number for number, code in enumerate(codes) if code}
        executions = check(self.plan, self.folder, killed)
        assert reader.records() == JournalStore(self.folder).records()
        return Tally(
            cells=self.plan.cells,
            failed=len(reader.failed()),
            processes=len(codes),
            kills=len(killed),
            torn=len(killed - self.shot),
            executions=executions,
            seconds=round(time.perf_counter() - started, 2),
        )

    def _start(self, *, last: bool = False) -> int:
        number = len(self.processes)
        worker = Worker(self.folder, self.plan, number, last=last)
        self.processes.append(PROCESSES.Process(target=worker))
        self.processes[-1].start()
        return number

    def _alive(self) -> list[int]:
        return [number for number, one in enumerate(self.processes) if one.is_alive()]

    def _kill(self, number: int) -> None:
        """Kills a worker some time from now: at any moment, or when the journal has just grown."""
        time.sleep(self.chance.uniform(0, 0.1))
        path = self.folder / "journal.jsonl"
        if self.chance.random() < 0.5 and path.exists():
            size, until = path.stat().st_size, time.monotonic() + 0.1
            while path.stat().st_size == size and time.monotonic() < until:
                time.sleep(0.0002)
        self.processes[number].kill()
        self.processes[number].join()
        if self.processes[number].exitcode == -signal.SIGKILL:
            self.shot.add(number)


def check(plan: Plan, folder: Path, killed: Collection[int]) -> int:
    """Checks what a round has left behind; returns the number of executions.

    Raises AssertionError: a cell is lost, recorded twice, run again after it was recorded or
        without a kill, has another result than in an uninterrupted run, or is still claimed; or a
        line of the journal is not whole.
    """
    content = (folder / "journal.jsonl").read_bytes()
    assert content.endswith(b"\n"), "a torn line stays at the end"
    lines = [json.loads(line) for line in content.splitlines()]
    records = chain.from_iterable(line if isinstance(line, list) else [line] for line in lines)
    recorded = Counter(record["id"] for record in records)
    ids = {cell.id for cell in cells_of(plan)}
    assert ids <= set(recorded), f"lost: {sorted(ids - set(recorded))}"
    assert set(recorded.values()) == {1}, f"recorded twice: {recorded.most_common(3)}"
    store = JournalStore(folder)
    done = {key: record.result for key, record in store.done().items()}
    kept = comparable(Outcome(done, store.failed()))
    assert kept == comparable(uninterrupted(plan)), "not the results of an uninterrupted run"
    assert not (held := store.claimed()), f"claimed: {held}"
    for key in ids:
        assert store.claim(key), f"{key} is still claimed"
        store.release(key)
    return _check_executions(folder, ids, killed)


def _check_executions(folder: Path, ids: set[str], killed: Collection[int]) -> int:
    workers = defaultdict[str, list[int]](list)
    for line in (folder / EXECUTIONS).read_bytes().splitlines():
        execution = json.loads(line)
        assert not execution["recorded"], f"run after it was recorded: {execution}"
        workers[execution["id"]].append(execution["worker"])
    assert set(workers) == ids
    for key, ran in workers.items():
        assert len(set(ran)) == len(ran), f"{key} was run twice by one process: {ran}"
        whole = [worker for worker in ran if worker not in killed]
        assert len(whole) <= 1, f"{key} was run again without a kill: {ran}"
    return sum(map(len, workers.values()))
