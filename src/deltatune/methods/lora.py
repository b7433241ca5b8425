"""LoRA: W' = W + (alpha / rank) B A.

Hu et al. 2021, arXiv:2106.09685. A starts Kaiming-uniform as in the authors' code, B at zero, so
that the model's function is unchanged at the start. Dropout falls on the input of A. On a fused
projection each of queries, keys and values has factors of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.low_rank import LowRank


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank, Method):
    """A low-rank difference of a weight matrix."""

    aliases: ClassVar[tuple[str, ...]] = ("lr",)

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * p["B"]
