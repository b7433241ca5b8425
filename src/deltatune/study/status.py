"""How far a study is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltatune.study.experiment import STUDY
from deltatune.study.store import Claim, Done, Failed, Note, Store

__all__ = ["Status", "status"]


@dataclass(frozen=True)
class Status:
    """How far a study is. Every cell that is known of is done, failed, running or waiting.

    Attributes:
        done: cells that ran to their end.
        failures: of the cells that failed and are not tried again just now.
        running: id -> claim of those that a process is working on.
        waiting: planned so far and not begun. A comparison plans its last part, with all seeds,
            when the learning rates are chosen.
        mean_seconds: of a cell that is done, training and evaluation; None if there is none.
        all_planned: whether nothing will be added: every comparison has planned its last part.
    """

    done: int
    failures: tuple[Failed, ...]
    running: Mapping[str, Claim]
    waiting: int
    mean_seconds: float | None
    all_planned: bool

    @property
    def planned(self) -> int:
        """All cells that are known of."""
        return self.done + len(self.failures) + len(self.running) + self.waiting

    @property
    def processes(self) -> int:
        """How many are at work."""
        return len({claim.worker for claim in self.running.values() if claim.worker})

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run."""
        return self.all_planned and not self.running and not self.waiting

    @property
    def seconds_left(self) -> float | None:
        """What the cells that are left will take the processes that are at work, or one, if each
        takes the mean; None where there is no mean.
        """
        if self.mean_seconds is None:
            return None
        return (len(self.running) + self.waiting) * self.mean_seconds / max(1, self.processes)


def status(store: Store) -> Status:
    """Looks how far the study of a store is. Raises DataError if the store is damaged."""
    claimed = store.claimed()  # first, so that what ends meanwhile counts as ended
    notes = {record.name: record.value for record in store.records() if isinstance(record, Note)}
    recorded = dict(store.recorded())
    done = [record for record in recorded.values() if isinstance(record, Done)]
    running = {
        key: claim for key, claim in claimed.items() if not isinstance(recorded.get(key), Done)
    }
    failures = tuple(
        record
        for key, record in recorded.items()
        if isinstance(record, Failed) and key not in running
    )
    return Status(
        done=len(done),
        failures=failures,
        running=running,
        waiting=len(_planned(notes) - set(recorded) - set(running)),
        mean_seconds=statistics.fmean(r.result.total_seconds for r in done) if done else None,
        all_planned=_all_planned(notes),
    )


def _planned(notes: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The ids that comparisons have noted: what they searched with, and their final cells."""
    return {
        cell_id
        for value in notes.values()
        for part in ("searched", "final")
        for cell_id in value.get(part, ())
    }


def _all_planned(notes: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every comparison that was begun has final cells, and every part of a study was."""
    finals = [value["final"] for value in notes.values() if "final" in value]
    parts = notes[STUDY]["parts"] if STUDY in notes else ()
    return all(finals) and len(finals) >= len(parts)
