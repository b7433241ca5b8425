"""Tensors of a pickle, read by torch's unpickler of tensors alone, and only where that is asked.

`torch.load(weights_only=True)` calls nothing that a file names. What it would allocate is bounded
before: the file must be torch's zip, its entries not compressed, its pickle short; and all shapes
are read first, on the `meta` device, which allocates nothing.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.core.errors import ArtefactError
from deltatune.core.untrusted import size_of
from deltatune.interop.folder import Header

__all__ = ["PickledHeader", "header_of"]

_LONGEST = 4 << 20  # bytes of the pickle itself, which names tensors and holds none
_KINDS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}
# What zipfile and torch's unpickler raise on the way through bytes that make no sense.
_BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def header_of(folder: Path, safe: str, pickled: str, *, allow_pickle: bool, library: str) -> Header:
    """The header of whichever file of tensors a folder has, safetensors before a pickle.

    Args:
        folder: the folder.
        safe: the name of its file of safetensors; "" where the library writes none.
        pickled: the name of its pickle.
        allow_pickle: whether the pickle may be read.
        library: whose folder it is, as errors name it.

    Raises ArtefactError: neither is there, the pickle is not allowed, or the file is malformed.
    """
    if safe and (folder / safe).exists():
        return Header.of(folder / safe)
    if not (folder / pickled).exists():
        raise ArtefactError(
            f"{folder} is no folder of {library}: {safe or pickled} is missing. Fetch it again."
        )
    if not allow_pickle:
        raise ArtefactError(
            f"{folder} has {pickled} alone, a pickle. Where you trust whoever wrote it, ask for "
            "it: load(..., allow_pickle=True); torch then reads tensors from it and nothing else."
        )
    return PickledHeader.of(folder / pickled)


@dataclass(frozen=True, eq=False)
class PickledHeader(Header):
    """What a pickle of tensors announces."""

    @classmethod
    def of(cls, path: Path) -> PickledHeader:
        """Reads the names and shapes. Raises ArtefactError."""
        _check_sizes(path)
        blank = _loaded(path, "meta")
        unknown = [name for name, value in blank.items() if value.dtype not in _KINDS]
        if unknown:
            raise ArtefactError(
                f"{path}: {unknown[0]} is of type {blank[unknown[0]].dtype}, which it cannot be."
            )
        shapes = {name: tuple(value.shape) for name, value in blank.items()}
        return cls(path, shapes, {name: _KINDS[value.dtype] for name, value in blank.items()})

    def values(self) -> dict[str, Tensor]:
        """See Header."""
        return _loaded(self.path, "cpu")


def _check_sizes(path: Path) -> None:
    """Raises ArtefactError unless the file is torch's zip, and holds no more than it has bytes."""
    try:
        size = size_of(path)
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except _BROKEN as error:
        raise ArtefactError(
            f"{path} cannot be read: {error}. Pickles from before torch 1.6 are not: load it with "
            "torch, where you trust it, and save it anew."
        ) from None
    held = sum(entry.file_size for entry in entries)
    texts = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or held > size or len(texts) != 1 or texts[0] > _LONGEST:
        raise ArtefactError(
            f"{path} is not as torch writes it: its entries are compressed, overlap, or announce "
            "more than they hold. Do not trust it."
        )


def _loaded(path: Path, device: str) -> dict[str, Tensor]:
    try:
        held: Any = torch.load(path, map_location=device, weights_only=True)
    except _BROKEN as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ArtefactError(f"{path} cannot be read: {text}. Fetch it again.") from None
    plain = isinstance(held, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in held.items()
    )
    if not plain:
        raise ArtefactError(f"{path} holds something else than tensors by name. Do not trust it.")
    return {name: value.detach() for name, value in held.items()}
