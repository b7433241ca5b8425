"""Where the states of rows are kept that a trunk cache gives: in memory, or in a folder.

Both keep what comes first and give nothing up for what comes later: rows come in another order in
every epoch, so that what would be given up next is as likely to be needed as any other.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.fingerprint import digest

__all__ = ["FolderStates", "MemoryStates", "States"]

_RECORD = struct.Struct("<16s16sQQ")  # key, digest of key and bytes, where they begin, how many


class States(Protocol):
    """Bytes by key, up to a bound.

    Attributes:
        full: why nothing more is kept; None while it is.
    """

    full: str | None

    def __len__(self) -> int: ...

    def read(self, key: bytes) -> Tensor | None:
        """What was written under a key, uint8 [bytes]; None if nothing was, or it is damaged."""

    def write(self, key: bytes, content: Tensor) -> None:
        """Keeps uint8 [bytes] under a key, or sets `full`."""

    def close(self) -> None:
        """Lets go of files."""


class MemoryStates:
    """States in memory.

    Args:
        capacity: of all of them, in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.full: str | None = None
        self._room, self._capacity = capacity, capacity
        self._held: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._held)

    def read(self, key: bytes) -> Tensor | None:
        """See States."""
        return self._held.get(key)

    def write(self, key: bytes, content: Tensor) -> None:
        """See States."""
        if self.full is not None or key in self._held:
            return
        if content.numel() > self._room:
            self.full = f"its {self._capacity:,} bytes are used"
            return
        self._room -= content.numel()
        self._held[key] = content.clone()

    def close(self) -> None:
        """See States."""


class FolderStates:
    """States in a folder: a file of their bytes, and a file that says where each begins.

    A folder serves one run at a time. Beside the states of one trunk it may hold those of others,
    which are not read but count for the bound. Every state is checked against a digest when it is
    read, so that nothing that a killed process or a failing disk left half written is used. Read by
    `pread` rather than through a map: both copy out of the system's cache, and a file that was cut
    gives an error here, where a map would kill the process.

    Args:
        folder: made if missing.
        identity: what the states depend on beside their key.
        capacity: of all files in the folder, in bytes.

    Raises ConfigurationError if the folder cannot be written or another run uses it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], capacity: int) -> None:
        self.full: str | None = None
        self._capacity = capacity
        name = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16)
        place = folder / name.hexdigest()
        try:
            place.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("a+")
            self._data = os.open(place / "states.bin", os.O_RDWR | os.O_CREAT, 0o666)
            self._index = os.open(place / "index.bin", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigurationError(
                f"The folder {folder} of the trunk cache cannot be written: {error.strerror}. "
                "Choose another."
            ) from error
        self._take_lock(folder)
        self._records = self._recover()
        used = sum(path.stat().st_size for path in folder.rglob("*.bin"))
        self._room = capacity - used
        self._end, self._written = os.fstat(self._data).st_size, os.fstat(self._index).st_size

    def _take_lock(self, folder: Path) -> None:
        try:
            # The system lets go of the lock when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self.close()
            raise ConfigurationError(
                f"The trunk cache in {folder} is used by another run, of process {holder}. "
                "Choose another folder, or wait for it."
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _recover(self) -> dict[bytes, tuple[bytes, int, int]]:
        """The records whose bytes are there; what a killed process left behind them is cut off."""
        size = os.fstat(self._data).st_size
        content = os.pread(self._index, os.fstat(self._index).st_size, 0)
        found: dict[bytes, tuple[bytes, int, int]] = {}
        whole, end = 0, 0
        for start in range(0, len(content) - _RECORD.size + 1, _RECORD.size):
            key, seal, place, count = _RECORD.unpack_from(content, start)
            if place + count > size:
                break
            found[key] = seal, place, count
            whole, end = start + _RECORD.size, max(end, place + count)
        os.ftruncate(self._index, whole)
        os.ftruncate(self._data, end)
        return found

    def __len__(self) -> int:
        return len(self._records)

    def read(self, key: bytes) -> Tensor | None:
        """See States."""
        if key not in self._records:
            return None
        seal, place, count = self._records[key]
        held = bytearray(count)
        if os.preadv(self._data, [held], place) == count:
            content = torch.frombuffer(held, dtype=torch.uint8)
            if _seal(key, content) == seal:
                return content
        del self._records[key]
        return None

    def write(self, key: bytes, content: Tensor) -> None:
        """See States."""
        if self.full is not None or key in self._records:
            return
        count = content.numel()
        if count + _RECORD.size > self._room:
            self.full = f"the {self._capacity:,} bytes of its folder are used"
            return
        seal = _seal(key, content)
        try:
            _put(self._data, content.numpy().tobytes(), self._end)
            _put(self._index, _RECORD.pack(key, seal, self._end, count), self._written)
        except OSError as error:
            self.full = f"its folder takes no more: {error.strerror}"
            os.ftruncate(self._index, self._written)
            os.ftruncate(self._data, self._end)
            return
        self._records[key] = seal, self._end, count
        self._end += count
        self._written += _RECORD.size
        self._room -= count + _RECORD.size

    def close(self) -> None:
        """See States."""
        os.close(self._data)
        os.close(self._index)
        self._lock.close()


def _put(file: int, content: bytes, place: int) -> None:
    """Writes all of it, or raises OSError: a full disk takes a part and says nothing."""
    if os.pwrite(file, content, place) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _seal(key: bytes, content: Tensor) -> bytes:
    return bytes.fromhex(digest({key.hex(): content}))
