"""MultiLoRA: W' = W + (alpha / rank) Σ_n diag(g_n) B_n A_n.

Wang et al. 2023, arXiv:2311.11501. Both factors of every term start Kaiming-uniform, and g at zero
makes the start the identity. The terms lie side by side in one A and one B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("multilora")
@dataclass(frozen=True, kw_only=True)
class MultiLoRA(LowRank, Method):
    """Several low-rank differences, each with a trained gain for every output.

    Attributes:
        terms: how many.
    """

    terms: int = 3

    aliases: ClassVar[tuple[str, ...]] = ("multi_lora",)
    count: ClassVar[str] = "n (r (i + d) + d)"

    def check(self) -> None:
        super().check()
        if self.terms < 1:
            raise ConfigurationError(f"multilora: terms must be at least 1; found {self.terms}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        width = self.terms * self.rank
        return {
            "A": uniform(width, site.inputs, bound=site.inputs**-0.5),
            "B": uniform(site.outputs, width, bound=self.rank**-0.5),
            "gain": zeros(site.outputs, self.terms),
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * p["gain"].repeat_interleave(self.rank, dim=-1) * p["B"]
