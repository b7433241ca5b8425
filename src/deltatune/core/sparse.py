"""Tensors that are mostly zero, as an artefact keeps them: what is not zero, and where it stands.

Whatever the method: a difference that was pruned in training is as small in a file as what is left
of it. Nothing is lost but the sign of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deltatune.core.errors import ArtefactError

__all__ = ["pack", "packed_shapes", "places_of", "unpack"]

# Below this a tensor is not worth a second one. A value costs twice as much with its place; at a
# quarter the file is half as large.
_SMALLEST, _SHARE, _LARGEST = 4096, 0.25, 2**31
# What zeros may unfold to, in bytes: so much of any file, and so often what a larger one holds.
_ROOM, _TIMES = 1 << 30, 256


def places_of(name: str) -> str:
    """How a file calls the places of a packed tensor."""
    return f"{name}#places"


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What goes into the file, and of each tensor that is packed how many entries are there.

    Only fp32 tensors of 4,096 to 2³¹ entries are packed. Places are ascending int32.
    """
    packed: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, value in tensors.items():
        packed[name] = value
        if value.dtype != torch.float32 or not _SMALLEST <= value.numel() < _LARGEST:
            continue
        flat = value.flatten()
        numbers, most = flat.numpy(), _SHARE * len(flat)
        # To count takes a tenth of the time of the places, and half of a dense tensor tells.
        if any(np.count_nonzero(n != 0) > most for n in (numbers[: len(numbers) // 2], numbers)):
            continue
        places = flat.nonzero().flatten()
        packed[name], packed[places_of(name)] = flat[places], places.int()
        counts[name] = len(places)
    return packed, counts


def packed_shapes(
    shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], size: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, from those of what it means.

    Args:
        shapes: of the whole tensors.
        counts: of those that are packed, how many entries are there.
        size: of the file, in bytes.

    Raises ArtefactError for more entries than the tensor has, for a tensor that is not packed, and
    for more memory than a file of this size may ask for.
    """
    found, room = dict(shapes), _ROOM + _TIMES * size
    for name, count in counts.items():
        whole = math.prod(shapes[name])
        if not 0 <= count <= whole or not _SMALLEST <= whole < _LARGEST:
            raise ArtefactError(f"{name} cannot have {count} entries in {shapes[name]}.")
        found[name] = found[places_of(name)] = (count,)
        room -= 4 * whole
    if room < 0:
        raise ArtefactError(
            f"A file of {size:,} bytes unfolds to {-room:,} bytes more than it may: it says that "
            "tensors are zero which are far larger than all it holds."
        )
    return found


def unpack(name: str, shape: tuple[int, ...], values: Tensor, places: Tensor) -> Tensor:
    """The whole tensor. Raises ArtefactError unless places ascend within it."""
    size = math.prod(shape)
    ascending = places.dtype == torch.int32 and bool((places[1:] > places[:-1]).all())
    if not ascending or (len(places) and not 0 <= int(places[0]) <= int(places[-1]) < size):
        raise ArtefactError(f"The places of {name} are no ascending int32 numbers below {size}.")
    flat = torch.zeros(size, dtype=values.dtype)
    flat[places.long()] = values
    return flat.view(shape)
