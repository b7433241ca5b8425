"""LoRA-XS: W' = W + (alpha / rank) U R S Vᵀ, U S Vᵀ the r largest singular triplets of W.

Bałazy et al. 2024, arXiv:2405.17484. R alone is trained, U and S Vᵀ are stored. R starts at zero,
where the authors draw it from N(0, 1e-5²): its gradient at zero is not zero, and the start is the
identity. As in their code S stands on the side of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, zeros
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank
from deltatune.primitives.spectral import Decomposition, triplets


@register("lora_xs")
@dataclass(frozen=True, kw_only=True)
class LoRAXS(LowRank, Method):
    """A small matrix between the principal directions of the weight."""

    learning_rate: ClassVar[float] = 3e-3
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r²"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        drawn = Decomposition(site, self._directions)
        directions = {n: drawn.fixed(n, *leaf.shape) for n, leaf in super().init(site).items()}
        return {"R": zeros(self.rank, self.rank), **directions}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * (p["B"] @ p["R"])

    def _directions(self, W: Tensor) -> Mapping[str, Tensor]:
        U, S, V = triplets(W, slice(self.rank))
        return {"A": S[:, None] * V, "B": U}
