"""VB-LoRA: W' = W + B A, both cut into pieces that are mixtures of vectors from one bank.

Li et al. 2024, arXiv:2405.15179. A piece is a sum of the k vectors whose logits are largest, by the
softmax of these logits. The bank is one for all sites. It starts from U(-0.02, 0.02) and the logits
from N(0, 0.01), so that the start is not the identity. All logits are stored, where the authors
keep the k largest at the end of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, normal, uniform
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.blocks import pieces


@register("vb_lora")
@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """A low-rank difference of few vectors.

    Attributes:
        rank: r, the inner dimension of B A.
        vectors: n, in the bank.
        block: b, the length of a vector; divides both widths.
        chosen: k, the vectors of a piece.
    """

    rank: int = 4
    vectors: int = 256
    block: int = 256
    chosen: int = 2

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "r n (i + d) / b; n b once"
    identity: ClassVar[bool] = False

    def check(self) -> None:
        if self.rank < 1 or not 1 <= self.chosen <= self.vectors:
            raise ConfigurationError(
                f"vb_lora: rank from 1 on, and chosen from 1 to vectors; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        widest = min(site.inputs, site.outputs)
        if self.rank > widest:
            raise TargetError(
                f"vb_lora: rank={self.rank} adds nothing to {widest}, the smaller width of "
                f"{site.path}. Choose 1 to {widest}."
            )
        down, up = (pieces(w, self.block, self.name, site) for w in (site.inputs, site.outputs))
        return {
            "A": normal(self.rank, down, self.vectors, std=0.1),
            "B": normal(self.rank, up, self.vectors, std=0.1),
            "bank": uniform(self.vectors, self.block, bound=0.02).tied("model"),
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return self._mixed(p["A"], p["bank"]), self._mixed(p["B"], p["bank"]).mT

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """[..., rank, width] from logits [..., rank, pieces, vectors]."""
        largest, places = logits.topk(self.chosen, dim=-1)
        shares = torch.zeros_like(logits).scatter(-1, places, largest.softmax(-1))
        return (shares @ bank.unsqueeze(-3)).flatten(-2)
