"""Where the results of cells are kept.

A store is a list of records that only grows, and claims: at most one process at a time works on a
cell. `MemoryStore` is for tests and short sessions; `JournalStore` is a folder.

The journal is one record a line, a JSON object, or several that are kept together, an array of
them. A line is written under a lock, flushed and synced before the call returns, so that a process
killed at any moment loses at most the line it was writing. Such a torn last line is left out by
readers and cut off by the next writer. A line that is broken anywhere else is an error: something
other than a crash did that.
"""

from __future__ import annotations

import abc
import itertools
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from deltatune.core.errors import DataError, StateError, UnsupportedError
from deltatune.study.cell import Cell, CellResult, Strict

__all__ = [
    "Claim",
    "Done",
    "Failed",
    "JournalStore",
    "MemoryStore",
    "Note",
    "Record",
    "Store",
    "open_study",
    "this_process",
]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def this_process() -> str:
    """Names this process as others see it: "host:process"."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class Claim:
    """What is told to others of a cell that is being worked on.

    Attributes:
        worker: "host:process" of who works on it; "" where that is not written yet.
        cell: in words; "" if that was not said.
        when: it was claimed.
    """

    worker: str = field(default_factory=this_process)
    cell: str = ""
    when: str = field(default_factory=_now)


class _Entry(Strict):
    """What every record has: when it was written, and by which process."""

    schema_version: Literal[1] = 1
    when: str = Field(default_factory=_now)
    writer: str = Field(default_factory=this_process)


class Done(_Entry):
    """A cell that ran to its end."""

    kind: Literal["done"] = "done"
    id: str
    cell: Cell
    result: CellResult


class Failed(_Entry):
    """A cell that ended with an error. That is its outcome, until it is tried again on request.

    Attributes:
        error: the class of the error.
        message: what it said.
        trace: the traceback, as Python prints it.
    """

    kind: Literal["failed"] = "failed"
    id: str
    cell: Cell
    error: str
    message: str
    trace: str = ""


class Note(_Entry):
    """What a study wants to find again, by name. The last one of a name is in force."""

    kind: Literal["note"] = "note"
    name: str
    value: dict[str, Any]


Record = Annotated[Done | Failed | Note, Field(discriminator="kind")]
_RECORDS: TypeAdapter[list[Done | Failed | Note]] = TypeAdapter(list[Record])


class Store(abc.ABC):
    """Records that only grow, and claims on cells.

    Any number of processes may use one store, each through an object of its own. `append` returns
    after the records are safe; `records` returns all that were appended before the call, by anyone,
    in the order of appending.
    """

    @abc.abstractmethod
    def append(self, *records: Done | Failed | Note) -> None:
        """Adds records, all or none. Raises StateError if they cannot be kept."""

    @abc.abstractmethod
    def records(self) -> Sequence[Done | Failed | Note]:
        """Returns all records. Raises DataError if the store is damaged."""

    @abc.abstractmethod
    def recorded(self) -> Mapping[str, Done | Failed]:
        """Returns id -> what became of each cell, in the order in which it did: its `Done`, or the
        last `Failed` of one that was never done.

        It is a view, which later calls may change. Raises DataError if the store is damaged.
        """

    @abc.abstractmethod
    def claim(self, cell_id: str, claim: Claim | None = None) -> bool:
        """Takes a cell for the caller; False if someone else has it.

        A claim ends with `release` or with the process that holds it, however that ends.

        Args:
            cell_id: of the cell.
            claim: what others are told; None: that this process has it.
        """

    @abc.abstractmethod
    def release(self, cell_id: str) -> None:
        """Gives a claimed cell back."""

    @abc.abstractmethod
    def claimed(self) -> dict[str, Claim]:
        """Returns id -> claim of the cells that someone is working on at this moment."""

    def done(self) -> dict[str, Done]:
        """Returns id -> record of the cells that are done, in the order in which they were done."""
        return {key: found for key, found in self.recorded().items() if isinstance(found, Done)}

    def failed(self) -> dict[str, Failed]:
        """Returns id -> last record of the cells that failed and were not done since."""
        return {key: found for key, found in self.recorded().items() if isinstance(found, Failed)}

    def note(self, name: str) -> dict[str, Any] | None:
        """Returns the last note of that name, None if there is none."""
        values = [r.value for r in self.records() if isinstance(r, Note) and r.name == name]
        return values[-1] if values else None


class _Replay:
    """Records in their order, and what they say of each cell so far.

    It is kept as records come: a run asks before each cell, and looking through thousands of
    records each time would take seconds.
    """

    def __init__(self) -> None:
        self.records: list[Done | Failed | Note] = []
        self._cells: dict[str, Done | Failed] = {}
        self.cells = MappingProxyType(self._cells)

    def add(self, record: Done | Failed | Note) -> None:
        self.records.append(record)
        if isinstance(record, Note):
            return
        known = self._cells.get(record.id)
        if isinstance(record, Done) or not isinstance(known, Done):
            self._cells.pop(record.id, None)  # the last word stands last
            self._cells[record.id] = record


class MemoryStore(Store):
    """A store that ends with its process."""

    def __init__(self) -> None:
        self._replay = _Replay()
        self._claimed: dict[str, Claim] = {}

    def append(self, *records: Done | Failed | Note) -> None:
        """See `Store.append`."""
        for record in records:
            self._replay.add(record)

    def records(self) -> Sequence[Done | Failed | Note]:
        """See `Store.records`."""
        return tuple(self._replay.records)

    def recorded(self) -> Mapping[str, Done | Failed]:
        """See `Store.recorded`."""
        return self._replay.cells

    def claim(self, cell_id: str, claim: Claim | None = None) -> bool:
        """See `Store.claim`."""
        if cell_id in self._claimed:
            return False
        self._claimed[cell_id] = claim or Claim()
        return True

    def release(self, cell_id: str) -> None:
        """See `Store.release`."""
        self._claimed.pop(cell_id, None)

    def claimed(self) -> dict[str, Claim]:
        """See `Store.claimed`."""
        return dict(sorted(self._claimed.items()))


class JournalStore(Store):
    """A store in a folder: `journal.jsonl`, and a lock file for each cell that is being worked on.

    Args:
        folder: made if it is not there. It must be on a file system that knows POSIX locks.

    Raises:
        StateError: the folder cannot be made or written.
        UnsupportedError: this system has no POSIX locks.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "journal.jsonl"
        self._held: dict[str, IO[bytes]] = {}
        self._replay = _Replay()
        self._read_until = self._lines = 0
        with self._explained("make the folder"):
            (self.folder / "claims").mkdir(parents=True, exist_ok=True)

    def append(self, *records: Done | Failed | Note) -> None:
        """See `Store.append`."""
        texts = ",".join(record.model_dump_json() for record in records)
        line = (texts if len(records) == 1 else f"[{texts}]").encode() + b"\n"
        with self._explained("write the journal"), open(self.path, "a+b", buffering=0) as file:
            _lock(file, wait=True)
            end = _end_of_last_line(file)
            file.truncate(end)
            try:
                _write_all(file, line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def records(self) -> Sequence[Done | Failed | Note]:
        """See `Store.records`."""
        self._read_on()
        return tuple(self._replay.records)

    def recorded(self) -> Mapping[str, Done | Failed]:
        """See `Store.recorded`."""
        self._read_on()
        return self._replay.cells

    def claim(self, cell_id: str, claim: Claim | None = None) -> bool:
        """See `Store.claim`."""
        if cell_id in self._held:
            return False
        with self._explained("claim a cell"):
            file = open(self._claim_path(cell_id), "a+b", buffering=0)  # noqa: SIM115  (held)
            try:
                if not _lock(file, wait=False):
                    file.close()
                    return False
                file.truncate(0)
                _write_all(file, json.dumps(asdict(claim or Claim())).encode())
            except BaseException:
                file.close()
                raise
        self._held[cell_id] = file
        return True

    def release(self, cell_id: str) -> None:
        """See `Store.release`."""
        # The file stays: removing it while another process opens it would let two hold the lock.
        self._held.pop(cell_id).close()

    def claimed(self) -> dict[str, Claim]:
        """See `Store.claimed`.

        Each claim is tried for an instant. Who wants the cell in just that instant is told that it
        is taken, and asks again.
        """
        found = {}
        with self._explained("read the claims"):
            for path in sorted((self.folder / "claims").glob("*.lock")):
                with open(path, "rb") as file:
                    if not _lock(file, wait=False, shared=True):
                        found[path.stem] = _said(file.read())
        return found

    def _read_on(self) -> None:
        """Reads the lines that were written since the last look."""
        if not self.path.exists():
            return
        with self._explained("read the journal"), open(self.path, "rb") as file:
            file.seek(self._read_until)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        lines = whole.splitlines()
        parsed = [self._parsed(line, self._lines + n) for n, line in enumerate(lines, 1)]
        for record in itertools.chain.from_iterable(parsed):
            self._replay.add(record)
        self._lines += len(lines)
        self._read_until += len(whole)

    def _claim_path(self, cell_id: str) -> Path:
        return self.folder / "claims" / f"{cell_id}.lock"

    def _parsed(self, line: bytes, number: int) -> list[Done | Failed | Note]:
        try:
            return _RECORDS.validate_json(line if line.startswith(b"[") else b"[%b]" % line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"][1:])) or "line"
            raise DataError(
                f"{self.path}, line {number}, is not a record of a study ({where}: {first['msg']})."
                " Remove that line to go on without it."
            ) from None

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateError(
                f"Cannot {what} of the study in {self.folder}: {error.strerror or error}."
                " Give a folder that can be written, on a disk with room."
            ) from error


def open_study(folder: str | os.PathLike[str]) -> JournalStore:
    """Returns the store of a study that was begun before. Raises StateError if there is none."""
    if not (Path(folder) / "journal.jsonl").exists():
        raise StateError(
            f"There is no study in {folder}. Begin one: deltatune compare ... --out {folder}."
        )
    return JournalStore(folder)


def _lock(file: IO[bytes], *, wait: bool, shared: bool = False) -> bool:
    """Locks the file until it is closed; False if that would mean waiting."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        raise UnsupportedError(
            "A study's folder needs POSIX file locks, which this system does not have."
        ) from None
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _said(content: bytes) -> Claim:
    """Reads a claim, or as much of it as is written at this moment."""
    try:
        return Claim(**json.loads(content))
    except (ValueError, TypeError):
        return Claim(worker="", when="")


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Writes all of `data`; an unbuffered file may take it in parts, on a disk nearly full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _end_of_last_line(file: IO[bytes]) -> int:
    """Returns the size of the file without a torn last line."""
    end = file.seek(0, os.SEEK_END)
    step = 1 << 16
    while end:
        start = max(0, end - step)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
