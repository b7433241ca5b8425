"""DeLoRA: W' = W + (λ / rank) Σ_k b_k a_kᵀ / (|b_k| |a_k|) diag(|W|), |W| the norms of its columns.

Bini et al. 2025, arXiv:2503.18225. λ is trained and bounds the difference, whatever A and B become.
As in PEFT, to which the authors refer, W has a norm for each input, norms of a and b below 1e-4
count as that, and B starts at zero. The norms of W are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, constant
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank
from deltatune.primitives.spectral import Decomposition


@register("delora")
@dataclass(frozen=True, kw_only=True)
class DeLoRA(LowRank, Method):
    """Normalised terms of rank one, and their common strength.

    Attributes:
        alpha: λ at the start; it is trained.
    """

    alpha: float = 15.0

    learning_rate: ClassVar[float] = 1e-2
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r (i + d) + 1"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        norms = Decomposition(site, _norms).fixed("norms", site.inputs)
        return {**super().init(site), "bound": constant(1, value=self.alpha), "norms": norms}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        A, B = _directions(p["A"], -1), _directions(p["B"], -2)
        return p["norms"].unsqueeze(-2) * A, p["bound"].unsqueeze(-1) / self.rank * B


def _directions(matrix: Tensor, dim: int) -> Tensor:
    lengths = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
    unit: Tensor = matrix / lengths.clamp(min=1e-4)
    return unit


def _norms(W: Tensor) -> Mapping[str, Tensor]:
    return {"norms": torch.linalg.vector_norm(W, dim=0)}
