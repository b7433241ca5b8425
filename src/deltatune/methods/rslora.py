"""rsLoRA: W' = W + (alpha / √rank) B A.

Kalajdzievski 2023, arXiv:2312.03732. LoRA with the scale under which the size of activations and
gradients does not shrink as the rank grows; the same function as LoRA with alpha √rank for alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.low_rank import LowRank


@register("rslora")
@dataclass(frozen=True, kw_only=True)
class RsLoRA(LowRank, Method):
    """A low-rank difference whose scale suits any rank."""

    aliases: ClassVar[tuple[str, ...]] = ("rs_lora",)

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.alpha / math.sqrt(self.rank) * p["B"]
