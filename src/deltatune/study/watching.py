"""A running study at one moment, in words: for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from deltatune.study.cell import CellResult
from deltatune.study.status import status
from deltatune.study.store import Claim, Done, Failed, Store

__all__ = ["Ended", "Snapshot", "Work", "in_short", "snapshot", "what_became"]

RECENT = 8  # of the cells that ended last, so many are shown


@dataclass(frozen=True)
class Work:
    """A cell that is being worked on.

    Attributes:
        cell: in words; its id where nobody has said more.
        worker: "host:process"; "" where that is not known.
        seconds: since it was begun; None where that is not known.
    """

    cell: str
    worker: str
    seconds: float | None


@dataclass(frozen=True)
class Ended:
    """A cell that is done or has failed.

    Attributes:
        cell: in words.
        failed: whether it has.
        said: its score and time, or its error, in one line.
    """

    cell: str
    failed: bool
    said: str


@dataclass(frozen=True)
class Snapshot:
    """How far a study is, and what happens in it.

    Attributes:
        planned, done, failed, running, waiting, processes, seconds_left, ended: see `Status`.
        at_work: the cells that are being worked on, the longest first.
        recent: the cells that ended last, the latest first.
        failures: all cells that failed, the latest first.
    """

    planned: int
    done: int
    failed: int
    running: int
    waiting: int
    processes: int
    seconds_left: float | None
    ended: bool
    at_work: tuple[Work, ...]
    recent: tuple[Ended, ...]
    failures: tuple[Ended, ...]


def snapshot(store: Store) -> Snapshot:
    """Looks at the study of a store. Raises DataError if the store is damaged."""
    found = status(store)
    now = datetime.now(UTC)
    works = [_work(cell_id, claim, now) for cell_id, claim in found.running.items()]
    records = list(store.recorded().values())
    return Snapshot(
        planned=found.planned,
        done=found.done,
        failed=len(found.failures),
        running=len(found.running),
        waiting=found.waiting,
        processes=found.processes,
        seconds_left=found.seconds_left,
        ended=found.ended,
        at_work=tuple(sorted(works, key=lambda work: -(work.seconds or 0.0))),
        recent=_latest_first(records[-RECENT:]),
        failures=_latest_first(found.failures),
    )


def in_short(result: CellResult) -> str:
    """Returns the score and the time of a cell."""
    return f"{result.metric} {100 * result.score:.2f}, {result.total_seconds:.1f} s"


def what_became(record: Done | Failed) -> Ended:
    """Returns what became of a cell, in a line."""
    if isinstance(record, Done):
        return Ended(str(record.cell), False, in_short(record.result))
    first = (record.message.splitlines() or [""])[0]
    return Ended(str(record.cell), True, f"{record.error}: {first}")


def _latest_first(records: Iterable[Done | Failed]) -> tuple[Ended, ...]:
    return tuple(what_became(record) for record in records)[::-1]


def _work(cell_id: str, claim: Claim, now: datetime) -> Work:
    try:
        seconds = max(0.0, (now - datetime.fromisoformat(claim.when)).total_seconds())
    except (TypeError, ValueError):  # half written, or by another program
        return Work(claim.cell or cell_id, claim.worker, None)
    return Work(claim.cell or cell_id, claim.worker, seconds)
