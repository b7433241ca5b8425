"""Poly, Polytropon: W' = W + (alpha / rank) B A, A = Σ_n z_n A_n, B = Σ_n z_n B_n over skills n.

Ponti et al. 2022, arXiv:2202.13914. The factors are combined, not their products, by
z = σ(Z) / Σ σ(Z), so that a delta is one LoRA and can be merged. In training Z has logistic noise,
one draw for each step and site, where the authors draw for each row. A delta is one task, with one
row of their table of tasks; a bank with `sharing="method"` has the skills in common, as the authors
train them. Z starts within 0.001 of zero, the B at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, uniform
from deltatune.core.method import Leaves, Method, register
from deltatune.core.policy import Draws
from deltatune.core.site import Site
from deltatune.primitives.experts import Experts, several
from deltatune.primitives.hard_concrete import noisy
from deltatune.primitives.low_rank import LowRank


@register("poly")
@dataclass(frozen=True, kw_only=True)
class Poly(Experts, LowRank, Method):
    """A low-rank difference whose factors are mixed of skills."""

    experts: int = 4

    aliases: ClassVar[tuple[str, ...]] = ("polytropon",)
    shared_leaves: ClassVar[tuple[str, ...]] = ("A", "B")
    count: ClassVar[str] = "n (r (i + d) + 1)"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        skills = several(super().init(site), self.experts)
        return {**skills, "Z": uniform(self.experts, bound=1e-3)}

    def idle(self, site: Site, leaf: str) -> bool:
        return leaf == "Z" and self.experts == 1

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        return {**p, "Z": noisy(p["Z"], draws.of(site.name))}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        on = p["Z"].sigmoid()
        z = (on / on.sum(-1, keepdim=True)).unsqueeze(-1).unsqueeze(-1)
        return (z * p["A"]).sum(-3), self.scale * (z * p["B"]).sum(-3)
