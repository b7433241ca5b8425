"""Swapping: a delta from disk into a slot that is attached already, by one read into the bank.

It is verified as `load` does it, once for each state of the folder that this process has seen
(size, time and inode of both files); a delta that comes back costs the read alone.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltatune.core.artefact import backbone_of, files_of, read, read_listed, refuse
from deltatune.core.delta import Delta
from deltatune.core.description import Artefact
from deltatune.core.errors import ArtefactError, StateError
from deltatune.core.grammar import Expression
from deltatune.core.in_place import InPlaceBank
from deltatune.core.sparse import places_of, unpack

__all__ = ["swap"]

Content = np.ndarray[Any, np.dtype[np.uint8]]
_READ = threading.local()
_ABOUT = "__metadata__"  # of a safetensors header, beside the tensors
Stamp = tuple[tuple[int, int, int], ...]


@dataclass
class _Verified:
    """An artefact whose files were found to be what they say.

    Attributes:
        artefact: its description.
        start: where the tensors begin in their file, in bytes.
        places: name in the file to offset behind `start`.
        trained: the names of fp32 tensors in the order of the file, where it holds nothing else.
        digest: of a slot that holds it; None until one did.
    """

    artefact: Artefact
    start: int
    places: dict[str, int]
    trained: list[str]
    digest: str | None = None


def swap(delta: Delta, folder: str | Path, slot: int = 0) -> None:
    """Puts the delta in `folder` in the place of what one slot of an attached delta holds.

    Args:
        delta: attached, of the method that the folder names.
        folder: of an artefact.
        slot: which of its slots.

    Raises:
        ArtefactError: the files are damaged, or hold another method.
        BackboneMismatchError: it was made for another backbone.
        ConfigurationError: there is no such slot.
        StateError: the slot is merged or shares leaves, the delta is not attached, or it trains in
            place.
    """
    delta.check_slot(slot)
    bank = delta.bank
    if isinstance(bank, InPlaceBank) or not delta.attached or delta.merged_slot == slot:
        raise StateError(
            f"Slot {slot} of {delta.name} cannot be replaced: it is merged or detached, or trains "
            "the backbone itself."
        )
    if delta.shares:
        raise StateError(
            f"The slots of {delta.name} share leaves, which another delta's would replace in all "
            "of them. Load it as a delta of its own: dt.load(folder, model)."
        )
    path = Path(folder)
    held = _verified(path, _stamp(path))
    wanted = _text(delta.expressions[slot])
    if held.artefact.method != wanted:
        raise ArtefactError(
            f"{path} holds {held.artefact.method}, slot {slot} of this delta {wanted}. Load it as "
            "a delta of its own: dt.load(folder, model)."
        )
    refuse(path, held.artefact, backbone_of(delta))
    content = _content(path, held)
    if held.trained == list(bank.trained) and not bank.fixed:  # a row lies as the file does
        bank.overwrite(slot, torch.from_numpy(content).view(torch.float32))
    else:
        bank.write(slot, _tensors(held, content))
    held.digest = held.digest or bank.digest(slot)
    delta.saved[slot] = (str(path), held.digest)
    delta.origins.pop(slot, None)


def _content(folder: Path, held: _Verified) -> Content:
    """What follows the header of the file, in memory that the next read of this thread takes."""
    size = held.artefact.size - held.start
    if len(getattr(_READ, "memory", ())) < size:
        _READ.memory = np.empty(size, dtype=np.uint8)
    content: Content = _READ.memory[:size]
    with files_of(folder)[1].open("rb", buffering=0) as file:
        file.seek(held.start)
        start = 0
        while start < size and (count := file.readinto(content.data[start:])):
            start += count
    if start < size:
        raise ArtefactError(f"{folder} was truncated while it was read. Fetch it again.")
    return content


def _tensors(held: _Verified, content: Content) -> dict[str, Tensor]:
    """The tensors of a file's content by name, without a copy."""
    values = {}
    for name, entry in held.artefact.tensors.items():
        dtype, count = getattr(torch, entry.dtype), entry.entries
        size = math.prod(entry.shape) if count is None else count
        flat = _view(content, dtype, size, held.places[name])
        if count is None:
            values[name] = flat.view(entry.shape)
        else:
            places = _view(content, torch.int32, count, held.places[places_of(name)])
            values[name] = unpack(name, entry.shape, flat, places)
    return values


def _view(content: Content, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    if not count:  # torch makes no view of nothing
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset)


def _stamp(folder: Path) -> Stamp:
    """What changes when a file of an artefact is written or replaced."""
    try:
        found = [file.stat() for file in files_of(folder)]
    except OSError as error:
        raise ArtefactError(f"{folder} is no delta: {error.strerror}.") from None
    return tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in found)


@functools.lru_cache(maxsize=4096)
def _verified(folder: Path, stamp: Stamp) -> _Verified:
    """Reads and checks everything. Raises ArtefactError."""
    del stamp
    artefact = read(folder)
    read_listed(folder, artefact)
    with files_of(folder)[1].open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places = {name: held["data_offsets"][0] for name, held in header.items() if name != _ABOUT}
    entries = artefact.tensors.values()
    plain = all(entry.dtype == "float32" and entry.entries is None for entry in entries)
    trained = sorted(places, key=places.__getitem__) if plain else []
    return _Verified(artefact, 8 + size, places, trained)


@functools.cache
def _text(expression: Expression) -> str:
    """The text of a slot's methods, which an artefact of the same leaves names."""
    return str(expression)
