"""LoKr: W' = W + (alpha / rank) C ⊗ (B A), a Kronecker product with one factor of low rank.

Yeh et al. 2023, arXiv:2309.14859. C takes the smaller factor of each width and starts at
zero. Where r is not below half of the larger factor, B A is one dense matrix D and the scale is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.kronecker import cut
from deltatune.primitives.low_rank import LowRank


@register("lokr")
@dataclass(frozen=True, kw_only=True)
class LoKr(LowRank, Method):
    """A Kronecker product.

    Attributes:
        factor: into which both widths are cut; 0: the factors nearest to each other.
    """

    alpha: float = 8.0
    factor: int = 0

    count: ClassVar[str] = "d1 i1 + r (d2 + i2)"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        o1, o2 = cut(site.outputs, self.factor, self.name, site)
        i1, i2 = cut(site.inputs, self.factor, self.name, site)
        if 2 * self.rank >= max(o2, i2):
            return {"C": zeros(o1, i1), "D": uniform(o2, i2, bound=i2**-0.5)}
        A = uniform(self.rank, i2, bound=i2**-0.5)
        return {"C": zeros(o1, i1), "A": A, "B": uniform(o2, self.rank, bound=self.rank**-0.5)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return W + torch.kron(p["C"], p["D"] if "D" in p else self.product(p)), b
