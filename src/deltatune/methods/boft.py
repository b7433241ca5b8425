"""BOFT: W' = diag(s) W R_mᵀ ... R_1ᵀ, rotations in blocks between which the features are shuffled.

Liu et al. 2024, arXiv:2311.06243. R_1 is block-diagonal like OFT's; R_k+1 has the blocks that hold
half of a block of each of two neighbouring groups of 2^(k-1) blocks, so that m = log2(in / b) + 1
factors join every feature with every other. As in PEFT, blocks are stored whole and made skew
(there with the other sign), and s, a gain of every row, is trained; depth=1 is OFT with such gains.
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
from deltatune.primitives.blocks import cayley, pieces


@register("boft")
@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """A product of block-diagonal rotations.

    Attributes:
        block: features of a block, even.
        depth: m; in / block is to be a multiple of 2^(m-1).
    """

    block: int = 8
    depth: int = 1

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "m i b + d, m the depth"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        if self.depth < 1 or self.block < 2 or self.block % 2:
            raise ConfigurationError(
                f"boft: an even block and a depth of one or more; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        count = pieces(site.inputs, self.block, self.name, site)
        pieces(count, 2 ** (self.depth - 1), f"{self.name} in blocks", site)
        shape = self.depth, count, self.block, self.block
        return {"Q": zeros(*shape), "s": ones(site.outputs)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        turned = p["s"].unsqueeze(-1) * W
        for k, R in enumerate(cayley((p["Q"] - p["Q"].mT) / 2).unbind(0)):
            halves = (-1, 2, 2**k, self.block // 2)
            mixed = torch.unflatten(turned, 1, halves).transpose(2, 3) if k else turned
            mixed = (mixed.reshape(len(W), -1, 1, self.block) @ R.mT).flatten(1)
            back = torch.unflatten(mixed, 1, (-1, 2**k, 2, self.block // 2)).transpose(2, 3)
            turned = back.flatten(1) if k else mixed
        return turned, b
