"""Folders of other libraries: a configuration in JSON, and the header of a file of tensors.

Both come from anywhere. The configuration is text of a bounded length, nothing in it is called or
imported, and the header says every shape before a tensor is read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltatune.core.errors import ArtefactError, DeltatuneError
from deltatune.core.untrusted import content_of, json_of, tensors_of

__all__ = ["CONFIGURATION", "TENSORS", "Header", "read_configuration", "told", "write_folder"]

CONFIGURATION, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LONGEST = 4 << 20  # bytes of a configuration; the longest of PEFT name each module of a model
_REAL = ("F64", "F32", "F16", "BF16")
_WHOLE = ("I64", "I32", "I16", "U8")


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """What a method or a model refuses, as an error of the folder."""
    try:
        yield
    except ArtefactError:
        raise
    except DeltatuneError as error:
        raise ArtefactError(f"{folder} cannot be attached: {error}") from None


def read_configuration(
    folder: Path, name: str = CONFIGURATION, library: str = "PEFT"
) -> dict[str, Any]:
    """What a file of a folder says. Raises ArtefactError if it is missing or malformed.

    Args:
        folder: the folder.
        name: of the file.
        library: whose folder it is, as errors name it.
    """
    path = folder / name
    try:
        content = json_of(content_of(path, _LONGEST))
    except FileNotFoundError:
        raise ArtefactError(f"{folder} is no folder of {library}: {name} is missing.") from None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}. Fetch it again.") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no configuration, but a {type(content).__name__}.")
    return content


@dataclass(frozen=True, eq=False)
class Header:
    """What a file of tensors announces.

    Attributes:
        path: of the file.
        shapes: of its tensors, by name.
        kinds: their types, as safetensors calls them.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> Header:
        """Reads the header of a file of safetensors. Raises ArtefactError."""
        try:
            with tensors_of(path) as file:
                names = file.keys()
                slices = {name: file.get_slice(name) for name in names}
                shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
                kinds = {name: str(one.get_dtype()) for name, one in slices.items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}. Fetch it again.") from None
        return cls(path, shapes, kinds)

    def check(self, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Raises ArtefactError unless the tensors are those expected, by name and shape.

        Args:
            expected: name to shape.
            what: the method, as the error calls it.
        """
        missing = sorted(expected.keys() - self.shapes.keys())
        extra = sorted(self.shapes.keys() - expected.keys())
        if missing:
            raise ArtefactError(
                f"{self.path}: {what} needs {missing[0]} of shape {expected[missing[0]]}, which is "
                f"missing ({len(missing)} such). Save it anew, whole."
            )
        if extra:
            raise ArtefactError(
                f"{self.path}: {extra[0]} of shape {self.shapes[extra[0]]} belongs to nothing that "
                f"{what} has on this model ({len(extra)} such)."
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ArtefactError(
                    f"{self.path}: {name} has the shape {self.shapes[name]}; {what} on this model "
                    f"needs {shape}. Load the backbone that it was made for."
                )

    def read(self, ends: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """All tensors; real numbers in fp32, those whose names end so as int64. Raises
        ArtefactError for another type, and for values that are not finite.
        """
        whole = {name for name in self.shapes if ends and name.endswith(ends)}
        for name, kind in self.kinds.items():
            if kind not in (_WHOLE if name in whole else _REAL):
                raise ArtefactError(f"{self.path}: {name} is of type {kind}, which it cannot be.")
        found = {
            name: value.long() if name in whole else value.float()
            for name, value in self.values().items()
        }
        for name, value in found.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ArtefactError(
                    f"{self.path}: {name} holds values that are not finite. Train it anew."
                )
        return found

    def values(self) -> dict[str, Tensor]:
        """All tensors, as the file has them. Raises ArtefactError."""
        try:
            with tensors_of(self.path) as file:
                return {name: file.get_tensor(name) for name in self.shapes}
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtefactError(f"{self.path} cannot be read: {error}. Fetch it again.") from None


def write_folder(
    folder: Path, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes both files beside the place first, and renames them to it. Raises ArtefactError."""
    if folder.exists():
        raise ArtefactError(f"{folder} exists. Choose another folder.")
    part: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        # Several names may hold one tensor, which safetensors does not write.
        apart = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(apart, part / TENSORS, metadata={"format": "pt"})
        text = json.dumps(configuration, indent=2, sort_keys=True) + "\n"
        (part / CONFIGURATION).write_text(text, encoding="utf-8")
        part.chmod(0o755)
        os.rename(part, folder)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"Cannot write to {folder}: {error}.") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
