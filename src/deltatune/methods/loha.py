"""LoHa: W' = W + (alpha / rank) (B1 A1) ⊙ (B2 A2), of rank up to r².

Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859. The first is FedPara.
As in the second, LyCORIS, both A start from N(0, 1), B1 from N(0, 0.01) and B2 at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("loha")
@dataclass(frozen=True, kw_only=True)
class LoHa(LowRank, Method):
    """The Hadamard product of two low-rank matrices."""

    alpha: float = 8.0

    aliases: ClassVar[tuple[str, ...]] = ("fedpara",)
    count: ClassVar[str] = "2 r (i + d)"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {
            "A1": normal(self.rank, site.inputs, std=1.0),
            "B1": normal(site.outputs, self.rank, std=0.1),
            "A2": normal(self.rank, site.inputs, std=1.0),
            "B2": zeros(site.outputs, self.rank),
        }

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return W + self.scale * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"]), b
