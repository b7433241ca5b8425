"""The log of a run: a line of JSON for each event, cut back to the checkpoint when a run goes on.

The log of a run that was killed and started again is that of an uninterrupted one, but for times.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltatune.core.errors import ArtefactError, ConfigurationError, TrainingError

__all__ = ["Log"]


class Log:
    """The log file of one run, held by one process at a time.

    Raises ConfigurationError if the folder cannot be written or another process trains in it.

    Args:
        folder: of the run; made if missing. None: nothing is written.

    Attributes:
        lines: the number of lines written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.lines = 0
        self._file = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line that the disk refused must not come back when the file is closed.
            self._file = (folder / "log.jsonl").open("a+b", buffering=0)
        except OSError as error:
            raise ConfigurationError(
                f"The folder {folder} cannot be written: {error.strerror}. Choose another."
            ) from error
        try:
            # The system lets go of the lock when the process ends, however it ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigurationError(
                f"Another process trains in {folder}. Choose another folder, or wait for it."
            ) from error

    def cut(self, lines: int) -> None:
        """Keeps the first `lines` lines. Raises ArtefactError if there are fewer."""
        if self._file is None:
            return
        self._file.seek(0)
        whole = self._file.read().splitlines(keepends=True)
        if len(whole) < lines or not all(line.endswith(b"\n") for line in whole[:lines]):
            raise ArtefactError(
                f"{self._file.name} has {len(whole)} lines, its checkpoint counts {lines}: it was "
                "changed. Use another folder, or delete both files to begin afresh."
            )
        with self._explained():
            self._file.truncate(sum(len(line) for line in whole[:lines]))
        self.lines = lines

    def write(self, event: str, **fields: Any) -> None:
        """Appends a line, at once. Raises TrainingError if the disk does not take it."""
        if self._file is None:
            return
        line = json.dumps({"event": event, **fields}, allow_nan=False).encode() + b"\n"
        with self._explained():
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lines += 1

    def flush(self) -> None:
        """Makes sure that all lines are on the disk, before a checkpoint counts on them."""
        if self._file is not None:
            with self._explained():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file and of the folder."""
        if self._file is not None:
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"The log of the run cannot be written: {error.strerror}. Free space, then start "
                "the run again to go on from its last checkpoint."
            ) from error
