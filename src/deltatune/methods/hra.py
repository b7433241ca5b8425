"""HRA: W' = W Π_k (I - 2 u_k u_kᵀ / |u_k|²), a chain of Householder reflections.

Yuan et al. 2024, arXiv:2405.17484. The u start in equal pairs, whose reflections undo each other:
the start is the identity up to rounding. The authors' regulariser, which keeps the u orthogonal,
is left to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, given
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("hra")
@dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """Reflections of the input.

    Attributes:
        rank: how many, even.
    """

    rank: int = 8

    aliases: ClassVar[tuple[str, ...]] = ("householder",)
    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r i"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3
    identity: ClassVar[bool] = False

    def check(self) -> None:
        if self.rank < 2 or self.rank % 2:
            raise ConfigurationError(f"hra: rank is an even number from 2 on; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {"u": given((self.rank, site.inputs), _pairs)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        turned: Tensor = W
        for u in p["u"].unbind(0):
            turned = turned - (turned @ u).unsqueeze(-1) * (2 * u / u.dot(u))
        return turned, b


def _pairs(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    half = torch.randn(shape[0] // 2, shape[1], generator=random) / math.sqrt(shape[1])
    return half.repeat_interleave(2, dim=0)
