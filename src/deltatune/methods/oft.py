"""OFT: W' = W Rᵀ, R block-diagonal, every block a rotation (I - Q)⁻¹ (I + Q) with Q skew.

Qiu et al. 2023, arXiv:2306.07280. R turns the input, as in PEFT, so that lengths of and angles
between the rows of W stay what they were. Q starts at zero. Cayley's map is computed exactly, where
PEFT sums the first terms of a series; its own exact map has the other sign of Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.blocks import cayley, pieces, skew


@register("oft")
@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """A rotation of the input in blocks.

    Attributes:
        block: features of a block; divides the width of the input.
    """

    block: int = 32

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "i (b - 1) / 2"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3

    def init(self, site: Site) -> Mapping[str, Leaf]:
        count = pieces(site.inputs, self.block, self.name, site)
        return {"Q": zeros(count, self.block * (self.block - 1) // 2)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        R = cayley(skew(p["Q"], self.block))
        return (torch.unflatten(W, 1, (-1, 1, self.block)) @ R.mT).flatten(1), b
