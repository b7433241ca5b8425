"""LoRA-FA: W' = W + (alpha / rank) B A, A frozen as it was drawn.

Zhang et al. 2023, arXiv:2308.03303. The difference is linear in what is trained: those of two runs
with one seed add up to a difference of the same rank. A is stored with B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("lora_fa")
@dataclass(frozen=True, kw_only=True)
class LoRAFA(LowRank, Method):
    """A low-rank difference of which the upper factor alone is trained."""

    count: ClassVar[str] = "r d"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        leaves = super().init(site)
        return {**leaves, "A": replace(leaves["A"], trained=False)}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * p["B"]
