"""C3A: W' = W + C / in, C cut into square blocks, each a circulant matrix of its first row w.

Chen et al. 2025, arXiv:2407.19342. A circular convolution of the pieces of the input: entry (j, k)
of a block is w[(k - j) mod b], in the direction of PEFT, whose division by the width of the input
this is, too. Of full rank for b entries; w starts at zero.
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
from deltatune.primitives.blocks import pieces


@register("c3a")
@dataclass(frozen=True, kw_only=True)
class C3A(Method):
    """A block-circulant difference.

    Attributes:
        block: b; divides both widths.
    """

    block: int = 128

    aliases: ClassVar[tuple[str, ...]] = ("circular_convolution",)
    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "i d / b"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-1

    def init(self, site: Site) -> Mapping[str, Leaf]:
        high, wide = (
            pieces(width, self.block, self.name, site) for width in (site.outputs, site.inputs)
        )
        return {"w": zeros(high, wide, self.block)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        place = torch.arange(self.block, device=W.device)
        C = p["w"][..., (place - place[:, None]) % self.block]
        return W + C.transpose(1, 2).reshape(W.shape) / W.shape[1], b
