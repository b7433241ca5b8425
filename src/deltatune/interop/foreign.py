"""Folders of other libraries: whose one is, is seen by its files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.core.delta import Delta
from deltatune.interop import adapterhub, opendelta, peft

__all__ = ["read_foreign"]


def read_foreign(folder: str | Path, model: nn.Module, *, allow_pickle: bool) -> Delta | None:
    """Attaches what is in a folder of PEFT, AdapterHub or OpenDelta; None for any other folder.

    Args:
        folder: which.
        model: the backbone, as that library was given it.
        allow_pickle: read tensors that AdapterHub or OpenDelta kept as a pickle: tensors and
            nothing else, for whom you trust.

    Raises as `read` of the three.
    """
    if adapterhub.holds(folder):
        return adapterhub.read(folder, model, allow_pickle=allow_pickle)
    if opendelta.holds(folder):
        return opendelta.read(folder, model, allow_pickle=allow_pickle)
    return peft.read(folder, model) if peft.holds(folder) else None
