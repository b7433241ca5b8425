"""KronA: W' = W + scale (A ⊗ B), both factors dense.

Edalati et al. 2022, arXiv:2212.10650. Its rank is that of A times that of B, so that nothing is a
bottleneck. A starts Kaiming-uniform, B at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.kronecker import cut


@register("krona")
@dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """A Kronecker product of two small matrices.

    Attributes:
        factor: the height and the width of A or of B, whichever is smaller; 0: those nearest to
            the root of the width.
        scale: by which the product is multiplied.
    """

    factor: int = 0
    scale: float = 1.0

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "d1 i1 + d2 i2"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3

    def init(self, site: Site) -> Mapping[str, Leaf]:
        a1, b1 = cut(site.outputs, self.factor, self.name, site)
        a2, b2 = cut(site.inputs, self.factor, self.name, site)
        return {"A": uniform(a1, a2, bound=a2**-0.5), "B": zeros(b1, b2)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return W + self.scale * torch.kron(p["A"], p["B"]), b
