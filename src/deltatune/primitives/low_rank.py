"""The pair of factors that LoRA and its kin share: B A of rank r, A (r, in) and B (out, r)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Category, ReviewCategory
from deltatune.core.site import Site

__all__ = ["LowRank"]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What methods with a low-rank product have in common; a method says what becomes of it.

    Attributes:
        rank: r, the inner dimension of B A.
        alpha: the product is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0

    name: ClassVar[str]
    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r (i + d)"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        """Raises ConfigurationError for a rank below 1."""
        if self.rank < 1:
            raise ConfigurationError(f"{self.name}: rank must be at least 1; it is {self.rank}.")

    @property
    def scale(self) -> float:
        """By which the product is multiplied."""
        return self.alpha / self.rank

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """A [rank, inputs], Kaiming-uniform, and B [outputs, rank], zero.

        Raises TargetError for a rank above the smaller width of the site, which no matrix has.
        """
        widest = min(site.inputs, site.outputs)
        if self.rank > widest:
            raise TargetError(
                f"{self.name}: {site.path} maps {site.inputs} features to {site.outputs}, and "
                f"rank={self.rank} adds nothing to {widest}. Choose 1 to {widest}."
            )
        return {
            "A": uniform(self.rank, site.inputs, bound=site.inputs**-0.5),
            "B": zeros(site.outputs, self.rank),
        }

    def product(self, p: Mapping[str, Tensor]) -> Tensor:
        """(alpha / rank) B A, [outputs, inputs]."""
        return self.scale * (p["B"] @ p["A"])
