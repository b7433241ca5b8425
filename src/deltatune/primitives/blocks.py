"""Blocks on the diagonal: widths that are cut into equal pieces, and rotations of each piece."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.core.errors import TargetError
from deltatune.core.site import Site
from deltatune.primitives.kronecker import divisors

__all__ = ["cayley", "pieces", "skew"]


def pieces(width: int, size: int, method: str, site: Site) -> int:
    """How many pieces of `size` features a width has. Raises TargetError if it has no whole number.

    Args:
        width: of what is cut.
        size: of a piece.
        method, site: what is told in the error.
    """
    if size < 1 or width % size:
        raise TargetError(
            f"{method}: blocks of {size} do not divide a width of {width} at {site.path}. Choose "
            f"one of {', '.join(map(str, divisors(width)))}."
        )
    return width // size


def skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices [..., size, size] from what lies above their diagonals, [..., n]."""
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(*entries.shape[:-1], size * size)
    upper = upper.index_copy(-1, rows * size + columns, entries)
    matrix = torch.unflatten(upper, -1, (size, size))
    return matrix - matrix.mT


def cayley(Q: Tensor) -> Tensor:
    """The rotations (I - Q)⁻¹ (I + Q) of skew-symmetric Q, [..., size, size]."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    rotation: Tensor = torch.linalg.solve(one - Q, one + Q)
    return rotation
