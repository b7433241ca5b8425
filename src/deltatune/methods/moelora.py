"""MOELoRA: W' = W + (alpha / rank) Σ_n g_n B_n A_n, g = softmax(G e), the experts parting the rank.

Liu et al. 2023, arXiv:2310.18339. The gate sees the task alone: e is its embedding, at every site
one of its own, as in the authors' code. So a delta, which is one task, can be merged; a bank with
`sharing="method"` has the experts and G in common, as the authors train them. As there the A start
from N(0, 0.01²), the B at zero, e from N(0, 1) and G uniformly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, uniform
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.experts import Experts
from deltatune.primitives.low_rank import LowRank


@register("moelora")
@dataclass(frozen=True, kw_only=True)
class MoELoRA(Experts, LowRank, Method):
    """A low-rank difference in parts that a gate weighs for the task.

    Attributes:
        embedding: t, the width of the task's embedding.
    """

    rank: int = 16
    alpha: float = 32.0
    embedding: int = 64

    aliases: ClassVar[tuple[str, ...]] = ("moe_lora",)
    shared_leaves: ClassVar[tuple[str, ...]] = ("A", "B", "G")
    count: ClassVar[str] = "r (i + d) + t (n + 1), t the width of the task"

    def check(self) -> None:
        super().check()
        if self.rank % self.experts or self.embedding < 1:
            raise ConfigurationError(
                "moelora: experts divides rank and embedding is at least 1; found "
                f"experts={self.experts}, rank={self.rank}, embedding={self.embedding}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        pair = super().init(site)
        return {
            "A": normal(*pair["A"].shape, std=0.01),
            "B": pair["B"],
            "G": uniform(self.experts, self.embedding, bound=self.embedding**-0.5),
            "e": normal(self.embedding, std=1.0),
        }

    def idle(self, site: Site, leaf: str) -> bool:
        return leaf in ("G", "e") and self.experts == 1

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        gates = torch.einsum("...nt,...t->...n", p["G"], p["e"]).softmax(-1)
        weights = gates.repeat_interleave(self.rank // self.experts, dim=-1).unsqueeze(-2)
        return p["A"], self.scale * weights * p["B"]
