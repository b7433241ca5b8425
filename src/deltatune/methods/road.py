"""RoAd: pairs of output features turned by θ and scaled by α.

Liao and Monz 2024, arXiv:2409.00119. Within groups of g features, feature i and feature i + g / 2
make a pair: (y, z) to α (y cos θ - z sin θ, y sin θ + z cos θ). In variant 2 the two rows of this
matrix have a θ and an α each, in variant 4 all four entries. θ starts at zero, α at one.
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
        variant: 1, 2 or 4: how many θ, and how many α, a pair has.
    """

    group: int = 64
    variant: int = 1

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "d times the variant"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 3e-3

    def check(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ConfigurationError(f"road: group is an even number; it is {self.group}.")
        if self.variant not in (1, 2, 4):
            raise ConfigurationError(f"road: variant is 1, 2 or 4; it is {self.variant}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        pieces(site.outputs, self.group, self.name, site)
        size = self.variant * site.outputs // 2
        return {"theta": zeros(size), "alpha": ones(size)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return self._turn(W.mT, p).mT, b if b is None else self._turn(b, p)

    def fast(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return self._turn(y, {name: leaf.unsqueeze(-2) for name, leaf in p.items()})

    def _turn(self, y: Tensor, p: Leaves) -> Tensor:
        """The features, last, in pairs."""
        half = self.group // 2
        theta, alpha = (
            torch.unflatten(p[n], -1, (-1, self.variant, half)) for n in ("theta", "alpha")
        )
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == 4:
            cos, sin = cos[..., :2, :], sin[..., 2:, :]
        pairs = torch.unflatten(y, -1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        turned = torch.stack([-second, first], dim=-2)
        return (cos * pairs + sin * turned).flatten(-3)
