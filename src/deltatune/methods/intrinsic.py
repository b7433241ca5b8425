"""Intrinsic dimension: W' = W + λ P z for every parameter, one vector z for the whole model, P
random and fixed.

Aghajanyan et al. 2021, arXiv:2012.13255; without scales Li et al. 2018, arXiv:1804.08838. z starts
at zero. With `said` every tensor has a scale λ of its own, one at the start, and the scales are a
part of the dimension. P is Fastfood with rows of unit norm over its padded length, drawn from the
seed and the name of the tensor, never stored, and kept in memory: 8 bytes for each entry, padded to
a power of two. Where z is longer than a small tensor, the authors' code cuts it off, and P is wide
enough here; and the backward pass is the adjoint of the forward pass, which theirs is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, ones, zeros
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form
from deltatune.core.site import Site, sizes
from deltatune.primitives.fastfood import Fastfood


@register("intrinsic")
@dataclass(frozen=True, kw_only=True)
class Intrinsic(Method):
    """All parameters, moved within a random subspace.

    Attributes:
        dimension: of what is trained in all, scales included.
        said: whether every tensor has a scale.
        seed: of the projections.
    """

    dimension: int = 20000
    said: bool = True
    seed: int = 0

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    default_at: ClassVar[str] = "*"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "dimension, in all"

    def check(self) -> None:
        if self.dimension < 1:
            raise ConfigurationError(
                f"intrinsic: dimension must be at least 1; it is {self.dimension}."
            )

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        found = sizes(sites)
        length = self.dimension - (len(found) if self.said else 0)
        if length < 1:
            raise TargetError(
                f"intrinsic: dimension={self.dimension} leaves nothing beside the scales of "
                f"{len(found)} tensors. Choose {len(found) + 1} or more, or said=False."
            )
        return [
            replace(site, allotted={n: length for n in site.parameters if (site.name, n) in found})
            for site in sites
        ]

    def select(self, site: Site) -> Mapping[str, Form]:
        return {
            name: _Projected(
                Fastfood(site.entries(name), length, self.seed, f"{site.name}.{name}"), self.said
            )
            for name, length in site.allotted.items()
        }


@dataclass(frozen=True)
class _Projected(Form):
    projection: Fastfood
    scaled: bool

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        own = {f"{parameter}.scale": ones(1)} if self.scaled else {}
        return {"z": zeros(self.projection.inputs).tied("all"), **own}

    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        change = self.projection(p["z"]).view_as(incoming)
        return incoming + (p[f"{name}.scale"] * change if self.scaled else change)
