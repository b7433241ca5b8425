"""VeRA: W' = W + diag(b) B diag(d) A, with A and B random, frozen and shared.

Kopiczko et al. 2024, arXiv:2310.11454. d starts at 0.1, b at zero. A and B are shared by all sites
of equal widths, where the authors cut those of all sites out of the largest; they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, constant, uniform, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Two trained vectors about random factors.

    Attributes:
        rank: r, the inner dimension of B A; may exceed the widths.
        d_start: where d begins.
    """

    rank: int = 256
    d_start: float = 0.1

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r + d"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-2

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"vera: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        A = uniform(self.rank, site.inputs, bound=(3 / site.inputs) ** 0.5)
        B = uniform(site.outputs, self.rank, bound=(3 / self.rank) ** 0.5)
        return {
            "A": replace(A.tied(f"{site.inputs}"), trained=False),
            "B": replace(B.tied(f"{site.outputs}"), trained=False),
            "d": constant(self.rank, value=self.d_start),
            "b": zeros(site.outputs),
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["d"].unsqueeze(-1) * p["A"], p["b"].unsqueeze(-1) * p["B"]
