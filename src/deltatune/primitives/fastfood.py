"""Fastfood: a random projection P = H G Π H B / c, applied in O(L log L) and never formed.

Le, Sarlós and Smola 2013 (ICML). B is a diagonal of signs, Π a permutation, G a Gaussian diagonal,
H the Walsh-Hadamard matrix of size L, and c = √(L Σ G²) makes every row of the L by L matrix a unit
vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltatune.core.leaf import generator

__all__ = ["Fastfood", "walsh_hadamard"]

_SIDE = 64  # H is a Kronecker product of matrices up to this size: each is one pass over the data


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x along the last dimension, of a size L that is a power of two; H = Hᵀ and H H = L.

    Raises ValueError for another size.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"A Walsh-Hadamard transform has a size of 1, 2, 4, ...; this is {size}.")
    shape, done = x.shape, 1
    while done < size:
        side = min(size // done, _SIDE)
        H, pieces = _matrix(side, x), x.reshape(-1, side, done)
        x = pieces[..., 0] @ H if done == 1 else torch.bmm(H.expand(len(pieces), -1, -1), pieces)
        done *= side
    return x.reshape(shape)


def _matrix(size: int, like: Tensor) -> Tensor:
    H = like.new_ones(1, 1)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class Fastfood:
    """The first rows and columns of such a projection, from a key alone.

    Args:
        entries: rows, the size of what it gives.
        inputs: columns, the size of what it reads. L is the first power of two that is not below
            either.
        key: what the draw depends on.

    What is drawn is kept for each device, 8 bytes for each of L, and goes into no copy or pickle.
    """

    def __init__(self, entries: int, inputs: int, *key: object) -> None:
        self.entries = entries
        self.inputs = inputs
        self.key = key
        self.length = 1 << (max(entries, inputs) - 1).bit_length()
        self._held: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, z: Tensor) -> Tensor:
        """P z, [entries], from z, [inputs]; its gradient is Pᵀ's."""
        signs, order, gains = self._kept(z.device)
        mixed = walsh_hadamard(pad(z, (0, len(signs) - self.inputs)) * signs)
        return walsh_hadamard(mixed.index_select(0, order) * gains)[: self.entries]

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """B (signs), Π (which entry goes to each place) and G / c (gains), [L] each."""
        random = generator("fastfood", *self.key)
        signs = torch.randint(2, (self.length,), generator=random, dtype=torch.int8)
        order = torch.randperm(self.length, generator=random, dtype=torch.int32)
        G = torch.randn(self.length, generator=random)
        gains = G / (self.length * G.double().square().sum()).sqrt()
        return signs * 2 - 1, order, gains.float()

    def _kept(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The same for vectors that are zero behind the columns. H of one repeats its first M
        entries, M the first power of two that holds the columns, so that a transform of M does.
        """
        if device not in self._held:
            with torch.inference_mode(False):  # what is kept must serve in training too
                signs, order, gains = self.drawn()
                narrow = 1 << (self.inputs - 1).bit_length()
                self._held[device] = (
                    signs[:narrow].clone().to(device),
                    (order % narrow).to(device),
                    gains.to(device),
                )
        return self._held[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}
