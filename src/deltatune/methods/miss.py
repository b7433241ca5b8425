"""MiSS: y += (Σ_k x_k) D, the input cut into pieces of r features that are summed.

Kang and Yin 2024, arXiv:2409.15371. There it is also Bone. In weights W' = W + Dᵀ [I I ... I], a
difference of rank r of which D (r, out) alone is trained, and which starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, fixed, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("miss")
@dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    """A trained matrix that all pieces of the input share.

    Attributes:
        rank: r, the features of a piece; the last one may have fewer.
    """

    rank: int = 64

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r d"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"miss: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        sums = fixed((self.rank, site.inputs), _sums)
        return {"D": zeros(self.rank, site.outputs), "sums": sums.tied(f"{site.inputs}")}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["sums"], p["D"].mT


def _sums(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    del random
    rank, inputs = shape
    return (torch.arange(inputs) % rank == torch.arange(rank)[:, None]).float()
