"""Binary masks made of scores: the straight-through gradient, and masks as bits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltatune.core.leaf import Leaf, constant

__all__ = ["all_on", "packed", "through", "unpacked"]


def through(on: Tensor, scores: Tensor) -> Tensor:
    """The mask `on` as numbers, whose gradient the scores get as it is."""
    return on.to(scores.dtype) + (scores - scores.detach())


def all_on(*shape: int) -> Leaf:
    """A mask of that shape as bits, [bytes], all on; it is not trained."""
    return replace(constant(-(-math.prod(shape) // 8), value=255), trained=False, dtype=torch.uint8)


def packed(on: Tensor) -> Tensor:
    """A mask as bits, [bytes]; those behind its end are off."""
    flat = on.flatten().to(torch.uint8)
    eights = pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << _places(on)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """The mask of bits as numbers, in the shape and the dtype of `like`."""
    flat = (bits.unsqueeze(-1) >> _places(bits) & 1).flatten()
    return flat[: like.numel()].view(like.shape).to(like.dtype)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
