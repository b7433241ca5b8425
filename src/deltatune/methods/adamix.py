"""AdaMix: y' = y + U_l σ(D_k y + c_k) + e_l, k and l drawn in every step among the experts.

Wang et al. 2022, arXiv:2205.12410. Behind the feed-forward. Every site draws for itself, down and
up apart; evaluation, and what is stored, is the mean of the experts, one bottleneck. The experts of
a site start alike and part by what they are drawn for. The authors also pull two draws of one batch
together (their consistency loss), which takes a second forward pass and is left out. As in their
setting U and e are shared unless `shared_up` is off; U starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.policy import Draws
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck
from deltatune.primitives.experts import Experts, alike


@register("adamix")
@dataclass(frozen=True, kw_only=True)
class AdaMix(Experts, Bottleneck, Method):
    """Bottlenecks behind every feed-forward, one of which takes part in a step.

    Attributes:
        shared_up: whether the experts have one U and one e in common.
    """

    experts: int = 4
    bottleneck: int = 16
    shared_up: bool = True

    aliases: ClassVar[tuple[str, ...]] = ("mixture_of_adaptations",)
    review_category: ClassVar[ReviewCategory] = "unified"
    count: ClassVar[str] = "n (dm + m) + dm + d; without sharing n (2dm + m + d)"
    default_at: ClassVar[str] = "ffn"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        up = 1 if self.shared_up else self.experts
        return {
            name: alike(leaf, self.experts if name in ("D", "c") else up)
            for name, leaf in super().init(site).items()
        }

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        down, up = torch.randint(self.experts, (2,), generator=draws.of(site.name)).tolist()
        taken = {name: down if name in ("D", "c") else up % len(leaf) for name, leaf in p.items()}
        return {name: p[name][k : k + 1] for name, k in taken.items()}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.apply(y, {name: leaf.mean(0) for name, leaf in p.items()})

    def stored(self) -> Method:
        return replace(self, experts=1)

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        return {name: leaf.mean(0, keepdim=True) for name, leaf in p.items()}
