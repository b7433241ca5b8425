"""EVA: W' = W + (alpha / rank) B A, A beginning with right singular vectors of the inputs.

Paischer et al. 2024, arXiv:2410.07170. The leading vectors of all tokens that a site reads in the
first `rows` rows of the training data: eigenvectors of the mean of x xᵀ, exact, where the authors'
code updates an SVD batch by batch; nothing is centred. B starts at zero. All sites have one rank:
ranks are not redistributed by explained variance. Before training A is that of LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.method import Leaves, Method, register
from deltatune.core.policy import Found, Kind
from deltatune.primitives.from_data import FromData
from deltatune.primitives.low_rank import LowRank


@register("eva")
@dataclass(frozen=True, kw_only=True)
class EVA(FromData, LowRank, Method):
    """LoRA that begins in the directions that its inputs take most."""

    surveys: ClassVar[Kind] = "inputs"

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * p["B"]

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:
        del memory
        for found in sites:
            vectors = torch.linalg.eigh(found.seen["inputs"].double()).eigenvectors
            found.values["A"].copy_(vectors[:, -self.rank :].mT.flip(0))
