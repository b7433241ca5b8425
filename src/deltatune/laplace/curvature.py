"""The curvature of one leaf, gathered from gradients of rows, as eigenvalues in a basis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Gathered", "matrix_shape"]


@dataclass(frozen=True)
class Block:
    """The generalised Gauss-Newton matrix of a leaf [m, n], fp64: what a prior leaves of a variance
    is a small difference.

    Attributes:
        values: its eigenvalues that are not zero, [a b].
        left, right: [m, a] and [n, b], orthonormal columns whose outer products are its
            eigenvectors; None for single entries: the diagonal.
    """

    values: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def project(self, J: Tensor) -> Tensor:
        """Gradients [..., m, n] as coefficients [..., a b], fp64."""
        if self.left is None or self.right is None:
            return J.flatten(-2)
        return (self.left.mT @ J @ self.right).flatten(-2)


class Gathered:
    """What the gradients of rows add up to.

    Kronecker-factored, the matrix is L ⊗ R / trace(R), L the sum of G Gᵀ and R that of Gᵀ G over
    the gradients G: its partial traces are those of the matrix, and it is the matrix itself where
    that is a Kronecker product, as for a linear map without a nonlinearity behind it, or a vector.

    Args:
        shape: (m, n) of the leaf.
        diagonal: whether entries are taken apart instead.
        rank: a side wider than this keeps so many of its leading directions; None for all.
    """

    def __init__(self, shape: tuple[int, int], *, diagonal: bool, rank: int | None) -> None:
        self._squares = torch.zeros(shape, dtype=torch.float64) if diagonal else None
        self._sides = None if diagonal else tuple(_Side(width, rank) for width in shape)
        self._trace = 0.0

    def add(self, G: Tensor) -> None:
        """Adds gradients [rows, m, n], fp64."""
        if self._squares is not None:
            self._squares += G.square().sum(0)
        elif self._sides is not None:
            self._trace += float(G.square().sum())
            for side, columns in zip(self._sides, (G.movedim(1, 0), G.movedim(2, 0)), strict=True):
                side.add(columns.flatten(1))

    def block(self) -> Block:
        """What has been gathered."""
        if self._squares is not None:
            return Block(self._squares.flatten())
        assert self._sides is not None
        (left, rows), (right, columns) = (side.eigen() for side in self._sides)
        values = torch.outer(rows, columns).flatten() / (self._trace or 1.0)
        return Block(values, left, right)


class _Side:
    """Σ v vᵀ over vectors [width]: in full, or by its leading directions, found piece by piece."""

    def __init__(self, width: int, rank: int | None) -> None:
        self._rank = None if rank is None or width <= rank else rank
        size = width if self._rank is None else 0
        self._held = torch.zeros(width, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Adds the columns of a matrix [width, vectors]."""
        if self._rank is None:
            self._held.addmm_(vectors, vectors.mT)
            return
        joined = torch.cat([self._held, vectors], dim=1)
        U, S, _ = torch.linalg.svd(joined, full_matrices=False)
        self._held = U[:, : self._rank] * S[: self._rank]

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors [width, k] and eigenvalues [k]."""
        if self._rank is None:
            values, vectors = torch.linalg.eigh(self._held)
            return vectors, values.clamp_min(0)
        sizes = self._held.norm(dim=0)
        return self._held / sizes.clamp_min(torch.finfo(torch.float64).tiny), sizes.square()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a leaf as a matrix: a vector is a column, what has more axes is stacked."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return int(torch.Size(shape[:-1]).numel()), shape[-1]
