"""LoRA+: W' = W + (alpha / rank) B A, B learning faster than A.

Hayou et al. 2024, arXiv:2402.12354. The function of `lora`; the learning rate of B is that of A
times a ratio. The authors' own, smaller rate for embeddings has nothing to act on here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.primitives.low_rank import LowRank


@register("lora_plus")
@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LowRank, Method):
    """A low-rank difference whose two factors learn at different rates.

    Attributes:
        ratio: the learning rate of B over that of A.
    """

    ratio: float = 16.0

    learning_rate: ClassVar[float] = 3e-4
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "r (i + d)"

    def check(self) -> None:
        super().check()
        if self.ratio <= 0:
            raise ConfigurationError(f"lora_plus: ratio must be above 0; it is {self.ratio}.")

    def rate(self, leaf: str) -> float:
        return self.ratio if leaf == "B" else 1.0

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * p["B"]
