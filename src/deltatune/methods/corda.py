"""CorDA: W' = W + (alpha / rank) (B A - B0 A0), B0 A0 C the largest singular triplets of W C.

Yang et al. 2024, arXiv:2406.05223. C is the mean of x xᵀ over all tokens that a site reads in the
first `rows` rows of the training data, with a hundredth of its mean diagonal added to the diagonal,
so that it can be inverted. The authors take B0 A0 out of W, which stays as it is here. With
`smallest` the smallest triplets begin, so that what W does for such rows is left alone; the authors
look at rows of what is to be kept then, not of the task. Before training A0 and B0 are zero, which
is LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.core.policy import Found, Kind
from deltatune.primitives.from_data import FromData
from deltatune.primitives.spectral import Recentred, balanced

_DAMPING = 0.01


@register("corda")
@dataclass(frozen=True, kw_only=True)
class CorDA(FromData, Recentred, Method):
    """LoRA that begins where the weight meets its inputs.

    Attributes:
        alpha: with that of the authors, the rank, the product is scaled by one.
        smallest: whether the smallest triplets begin, not the largest.
        rows: see FromData.
    """

    alpha: float = 8.0
    smallest: bool = False
    rows: int = 256

    surveys: ClassVar[Kind] = "inputs"

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:
        del memory
        kept = slice(-self.rank, None) if self.smallest else slice(self.rank)
        for found in sites:
            C = found.seen["inputs"].double()
            C = C + _DAMPING * C.diagonal().mean() * torch.eye(len(C)).to(C)
            A, B = balanced(found.site.weight().to(C) @ C, kept, self.scale)
            self.begin(found.values, torch.linalg.solve(C, A, left=False), B)
