"""A folder of tasks: `<root>/<task>/{train,validation,test}.jsonl.gz` and `<root>/MANIFEST.csv`.

Each line of a file is a JSON object with the raw fields under the names of the task's hub dataset.
The manifest is optional; where it is there, its checksums are checked and its status and remarks
travel with the rows, to be shown beside every score.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.core.errors import DataError, UnknownNameError
from deltatune.tasks.example import Row, SplitName, Tables
from deltatune.tasks.sources.reading import read_rows, sha256
from deltatune.tasks.text import digest

if TYPE_CHECKING:
    from deltatune.tasks.task import Task

__all__ = ["FolderSource"]

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_COMPLETE = ("complete", "extra")


@dataclass(frozen=True)
class FolderSource:
    """A local folder that holds a folder per task.

    Attributes:
        root: the folder.
    """

    root: Path

    def tasks(self) -> tuple[str, ...]:
        """Returns the names of the tasks in the folder."""
        if not self.root.is_dir():
            raise DataError(f"{self.root}: there is no such folder of task data.")
        return tuple(sorted(path.parent.name for path in self.root.glob("*/train.jsonl*")))

    def folder_of(self, task: Task) -> str | None:
        """Returns the folder that holds the rows of `task`: its own, or that of the task whose rows
        it shares; None if neither is there."""
        wanted = (task.name, task.rows_of)
        return next((name for name in wanted if name and (self.root / name).is_dir()), None)

    def read(self, task: Task) -> Tables:
        """Returns the rows of `task`.

        Raises:
            DataError: the folder does not hold the task, a file is missing or broken, or its
                checksum is not that of the manifest.
        """
        names = self.tasks()
        folder = self.folder_of(task)
        if folder not in names:
            raise DataError(f"{self.root}: {UnknownNameError('task folder', task.name, names)}")
        entry = self._manifest().get(folder, {})
        shared = () if folder == task.name else (f"Rows of the folder {folder}.",)
        splits: dict[SplitName, tuple[Row, ...]] = {}
        sums: dict[str, str] = {}
        for split in _SPLITS:
            path = self._file(folder, split)
            sums[split] = sha256(path)
            expected = entry.get(f"sha256_{split}")
            if expected and expected != sums[split]:
                raise DataError(
                    f"{path}: the file is not the one that MANIFEST.csv describes (SHA-256 "
                    f"{sums[split][:12]}..., expected {expected[:12]}...). Copy it again."
                )
            splits[split] = read_rows(path)
        # The whole path would make the digest of a result depend on the machine.
        origin = f"folder {self.root.name}, {entry.get('source_repo') or 'source not stated'}"
        return Tables(
            splits, origin, _status(entry), digest(sums), (*shared, *_notes(entry)), final=False
        )

    def _file(self, name: str, split: str) -> Path:
        for suffix in (".jsonl.gz", ".jsonl"):
            path = self.root / name / f"{split}{suffix}"
            if path.is_file():
                return path
        raise DataError(f"{self.root / name}: there is no {split}.jsonl.gz.")

    def _manifest(self) -> dict[str, dict[str, str]]:
        path = self.root / "MANIFEST.csv"
        if not path.is_file():
            return {}
        rows = [dict(row.values) for row in read_rows(path)]
        if rows and "task_id" not in rows[0]:
            raise DataError(f"{path}:1: there is no column 'task_id'.")
        return {row["task_id"]: row for row in rows}


def _status(entry: dict[str, str]) -> str:
    status = entry.get("status", "local")
    return "complete" if status in _COMPLETE else status


def _notes(entry: dict[str, str]) -> list[str]:
    notes = []
    if entry.get("status") not in (None, *_COMPLETE):
        published = entry.get("published_rows") or "not stated"
        notes.append(f"The data is marked {entry['status']!r} (published rows: {published}).")
    if entry.get("split_note"):
        notes.append(f"Splits: {entry['split_note']}.")
    return notes
