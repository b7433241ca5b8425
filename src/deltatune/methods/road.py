"""RoAd: pairs of output features turned by θ and scaled by α.

Liao and Monz 2024, arXiv:2409.00119. Variant 1: within groups of g features, feature i and feature
i + g / 2 make a pair: (y, z) to α (y cos θ - z sin θ, y sin θ + z cos θ). θ starts at zero, α at
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, ones, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.blocks import pieces


@register("road")
@dataclass(frozen=True, kw_only=True)
class RoAd(Method):
    """Rotations of pairs of features.

    Attributes:
        group: g, even; divides the width of the output.
    """

    group: int = 64

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "d"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 3e-3

    def check(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ConfigurationError(f"road: group is an even number; it is {self.group}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        pieces(site.outputs, self.group, self.name, site)
        return {"theta": zeros(site.outputs // 2), "alpha": ones(site.outputs // 2)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return self._turn(W.mT, p).mT, b if b is None else self._turn(b, p)

    def fast(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return self._turn(y, {name: leaf.unsqueeze(-2) for name, leaf in p.items()})

    def _turn(self, y: Tensor, p: Leaves) -> Tensor:
        """The features, last, in pairs."""
        halves = (-1, 2, self.group // 2)
        first, second = torch.unflatten(y, -1, halves).unbind(-2)
        cos, sin = (
            torch.unflatten(p["alpha"] * f(p["theta"]), -1, (-1, self.group // 2))
            for f in (torch.cos, torch.sin)
        )
        pairs = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-2)
        return pairs.flatten(-3)
