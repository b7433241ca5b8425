"""LoRA: W' = W + (alpha / rank) B A.

Hu et al. 2021, arXiv:2106.09685. A starts Kaiming-uniform as in the authors' code, B at zero, so
that the model's function is unchanged at the start. Dropout falls on the input of A. On a fused
projection each of queries, keys and values has factors of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Category, Leaves, Method, register
from deltatune.core.site import Site


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """A low-rank difference of a weight matrix.

    Attributes:
        rank: r, the inner dimension of B A.
        alpha: the difference is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0

    category: ClassVar[Category] = "reparameterisation"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"lora: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {
            "A": uniform(self.rank, site.inputs, bound=site.inputs**-0.5),
            "B": zeros(site.outputs, self.rank),
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.alpha / self.rank * p["B"]
