"""The whole of a tensor, wherever it lies: sharded over processes, or offloaded by accelerate.

`fully_shard` leaves each process a part of every parameter; accelerate leaves a tensor on the
`meta` device in its place and keeps the values beside the module. Whatever reads a weight outside
of a forward (initial values, fingerprints, artefacts) reads it here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "first_parameter",
    "identity",
    "is_apart",
    "is_sharded",
    "kind_of",
    "overwrite",
    "whole",
    "whole_parameter",
]


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is sharded over processes.

    None is before somebody imports that class, and to import it takes longer than all else that
    attaching a delta needs.
    """
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def kind_of(module: nn.Module) -> type:
    """The class of a module, that from which `fully_shard` made the one it has where it did."""
    library, kind = sys.modules.get("torch.distributed.fsdp"), type(module)
    return kind.__mro__[2] if library is not None and issubclass(kind, library.FSDPModule) else kind


def whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor that may be sharded; every process of the mesh must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The full value of one of a module's own parameters or buffers, None where there is none.

    It is on the `meta` device only where nothing keeps a value.
    """
    held = module._parameters.get(name, module._buffers.get(name))
    if held is None or not held.is_meta:
        return None if held is None else whole(held)
    for hook in _hooks(module):
        kept = getattr(hook, "weights_map", None)
        if kept is not None:
            value: Tensor = kept[name]
            return value
    return held


def identity(module: nn.Module, name: str) -> int:
    """What tied parameters have in common: the parameter itself, or the memory it was offloaded to.

    Offloaded to disk each of them lies in a file of its own, and they are told apart no more.
    """
    held = module._parameters[name]
    value = whole_parameter(module, name) if held is not None and held.is_meta else None
    return id(held) if value is None or value.is_meta else value.data_ptr()


def first_parameter(module: nn.Module) -> Tensor:
    """The full value of the first parameter that a module or one of its children owns."""
    path, _ = next(module.named_parameters())
    owner, _, name = path.rpartition(".")
    found = whole_parameter(module.get_submodule(owner), name)
    assert found is not None
    return found


def is_apart(module: nn.Module) -> bool:
    """Whether a module's parameters are sharded or offloaded: they cannot be written in place."""
    held = [p for p in module._parameters.values() if p is not None]
    return any(is_sharded(p) or p.is_meta for p in held)


@torch.no_grad()
def overwrite(row: Tensor, pieces: Sequence[Tensor]) -> None:
    """Sets a flat tensor to its pieces, one behind the other.

    It may be sharded; every process of the mesh must give the same pieces then.
    """
    if is_sharded(row):
        from torch.distributed.tensor import distribute_tensor

        flat = torch.cat([piece.flatten().to(row.device, row.dtype) for piece in pieces])
        row.copy_(distribute_tensor(flat, row.device_mesh, row.placements))
        return
    start = 0
    for piece in pieces:
        row[start : start + piece.numel()].copy_(piece.flatten())
        start += piece.numel()


def _hooks(module: nn.Module) -> Iterator[object]:
    """The accelerate hooks of a module; several of them are kept as one sequence."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [hook])
