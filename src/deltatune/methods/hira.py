"""HiRA: W' = W + W ⊙ (alpha / rank) B A.

Huang et al. 2025, ICLR. The Hadamard product with W gives the difference up to r times the rank of
W. B starts at zero. PEFT has no alpha: there the scale is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.low_rank import LowRank


@register("hira")
@dataclass(frozen=True, kw_only=True)
class HiRA(LowRank, Method):
    """A difference of every entry in proportion to it."""

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return W + W * self.product(p), b
