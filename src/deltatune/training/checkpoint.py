"""Checkpoints: one safetensors file, its JSON in the header, replaced in one move.

There is no pickle in it. The file is written in a folder beside its place, flushed to the disk and
moved, so that at any moment the place holds a whole checkpoint or none. A folder, because
safetensors writes under a name of its own choice, which a killed process leaves behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltatune.core.errors import ArtefactError, TrainingError
from deltatune.core.untrusted import json_of, tensors_of

__all__ = ["Checkpoint", "Store", "made_with"]

_NAME = "checkpoint.safetensors"
_VERSION = 1
_KEYS = {"version", "identity", "record"}


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a checkpoint.

    Attributes:
        identity: what must be equal for a run to go on from here.
        record: JSON values.
        tensors: by name.
    """

    identity: Mapping[str, Any]
    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Store:
    """The checkpoint of one run in its folder.

    Args:
        folder: of the run; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME
        self._unfinished = folder / "checkpoint.unfinished"

    def clear_unfinished(self) -> None:
        """Removes what a killed process left of a checkpoint that it was writing."""
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def remove(self) -> None:
        """Removes the checkpoint, if there is one."""
        self.path.unlink(missing_ok=True)

    def write(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint. Raises TrainingError if the disk does not take it."""
        header = {
            "version": _VERSION,
            "identity": checkpoint.identity,
            "record": checkpoint.record,
        }
        metadata = {"deltatune": json.dumps(header, allow_nan=False)}
        # Copies: safetensors refuses views and shared storage, which tied weights have.
        tensors = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in checkpoint.tensors.items()
        }
        try:
            self._unfinished.mkdir(exist_ok=True)
            save_file(tensors, self._unfinished / _NAME, metadata)
            _flush(self._unfinished / _NAME)
            os.replace(self._unfinished / _NAME, self.path)
            self._unfinished.rmdir()
            _flush(self.path.parent)
        except (OSError, SafetensorError) as error:
            self.clear_unfinished()
            raise TrainingError(
                f"A checkpoint could not be written to {self.path.parent}: {error}. The one "
                "before it is whole. Free space or allow writing there, then start the run again "
                "to go on from it."
            ) from error

    def read(self, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Returns the checkpoint, None if there is none.

        Raises ArtefactError if it is damaged, of another version, or of a run with another
        identity.
        """
        if not self.path.exists():
            return None
        try:
            with tensors_of(self.path) as file:
                header = json_of((file.metadata() or {})["deltatune"].encode())
                if not isinstance(header, dict) or not set(header) >= _KEYS:
                    raise ValueError("its header is that of something else")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArtefactError(
                f"{self.path} is not a whole checkpoint ({error}). Delete it to begin afresh."
            ) from error
        if header["version"] != _VERSION:
            raise ArtefactError(
                f"{self.path} has version {header['version']}; this is version {_VERSION}. "
                "Go on with the version that wrote it, or use another folder."
            )
        if not isinstance(header["identity"], dict) or not isinstance(header["record"], dict):
            raise ArtefactError(f"{self.path} was changed. Delete it to begin afresh.")
        _compare(header["identity"], identity, self.path)
        return Checkpoint(header["identity"], header["record"], tensors)


def made_with() -> str:
    """What decides the last bits of a run beside its arguments."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint of another run, naming what differs."""
    expected = json.loads(json.dumps(expected))
    differing = [
        f"{key} was {found.get(key)!r} and is now {expected.get(key)!r}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if differing:
        raise ArtefactError(
            f"{path} belongs to another run: {'; '.join(differing)}. "
            "Start with what it was to go on, or use another folder."
        )


def _flush(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
