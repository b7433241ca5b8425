"""Hypercomplex layers: maps that are sums of Kronecker products, W = Σ_k R_k ⊗ F_k, n terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal
from deltatune.core.method import ReviewCategory
from deltatune.core.site import Site
from deltatune.primitives.blocks import pieces
from deltatune.primitives.factored import Factored

__all__ = ["SharedRule", "kronecker_sum"]


def kronecker_sum(rule: Tensor, parts: Tensor) -> Tensor:
    """The matrix (n out, n in) of a rule [n, n, n] and n matrices [n, out, in]."""
    return torch.einsum("kab,kcd->acbd", rule, parts).flatten(2).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class SharedRule(Factored):
    """A bottleneck of such maps whose F are of low rank, with one rule for all sites.

    Attributes:
        terms: n; divides the bottleneck and the width.
        rank: r, of every F = s t.
    """

    terms: int = 4
    rank: int = 1

    review_category: ClassVar[ReviewCategory] = "hybrid"
    count: ClassVar[str] = "2 r (d + m) + m + d; n³ once"

    def check(self) -> None:
        """Raises ConfigurationError for a rank below 1."""
        super().check()
        if self.rank < 1:
            raise ConfigurationError(f"{self.name}: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """The rule [n, n, n], and s and t of both maps, drawn as Glorot does."""
        n, r = self.terms, self.rank
        wide, low = (pieces(w, n, self.name, site) for w in (site.outputs, self.bottleneck))
        leaves = {"rule": normal(n, n, n, std=0.01).tied("model")}
        for name, into, out in (("down", wide, low), ("up", low, wide)):
            leaves[f"{name}_s"] = normal(n, out, r, std=(2 / (out + r)) ** 0.5)
            leaves[f"{name}_t"] = normal(n, r, into, std=(2 / (into + r)) ** 0.5)
        return {**leaves, **self.biases(site.outputs)}

    def maps(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Factored."""
        D, U = (kronecker_sum(p["rule"], p[f"{n}_s"] @ p[f"{n}_t"]) for n in ("down", "up"))
        return D, U
