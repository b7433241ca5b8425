"""PHM adapter: a bottleneck whose maps are sums of n Kronecker products, D = Σ_k A_k ⊗ B_k.

Mahabadi et al. 2021, arXiv:2106.04647; Zhang et al. 2021, arXiv:2102.08597. The second brings the
layer, the first the adapter, beside Compacter. Each of the two maps has a rule A (n, n, n) of its
own. Rules start from N(0, 0.0001), the B as Glorot does: near the identity, not at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, normal
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.blocks import pieces
from deltatune.primitives.factored import Factored
from deltatune.primitives.hypercomplex import kronecker_sum


@register("phm_adapter")
@dataclass(frozen=True, kw_only=True)
class PHMAdapter(Factored, Method):
    """A hypercomplex bottleneck behind every sublayer.

    Attributes:
        terms: n; divides the bottleneck and the width.
    """

    terms: int = 4

    aliases: ClassVar[tuple[str, ...]] = ("hypercomplex_adapter",)
    review_category: ClassVar[ReviewCategory] = "hybrid"
    count: ClassVar[str] = "2 (n³ + dm / n) + m + d"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        n = self.terms
        d, m = (pieces(w, n, self.name, site) for w in (site.outputs, self.bottleneck))
        std = (2 / (d + m)) ** 0.5
        return {
            "down_rule": normal(n, n, n, std=0.01),
            "down": normal(n, m, d, std=std),
            "up_rule": normal(n, n, n, std=0.01),
            "up": normal(n, d, m, std=std),
            **self.biases(site.outputs),
        }

    def maps(self, p: Leaves) -> tuple[Tensor, Tensor]:
        down, up = (kronecker_sum(p[f"{name}_rule"], p[name]) for name in ("down", "up"))
        return down, up
