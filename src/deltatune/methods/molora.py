"""MoLORA: y' = y + Σ_n g_n(x) (alpha / rank) B_n A_n x, g(x) = softmax(R x) for every token.

Zadouri et al. 2023, arXiv:2309.05444. A mixture of LoRAs whose router reads what the map reads and,
as in the paper, weighs all of them; with `chosen` a token takes only the experts of the largest
weights, as the paper's ablation does. There is no loss that balances them. What is added depends on
x, so that nothing can be merged. The B start at zero, R near uniform weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.experts import Routed, several
from deltatune.primitives.low_rank import LowRank


@register("molora")
@dataclass(frozen=True, kw_only=True)
class MoLoRA(Routed, LowRank, Method):
    """Low-rank differences, weighed anew for every token."""

    rank: int = 4

    aliases: ClassVar[tuple[str, ...]] = ("mixture_of_loras",)
    count: ClassVar[str] = "n (r (i + d) + i)"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {**several(super().init(site), self.experts), **self.router(site)}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        hidden = linear(x, p["A"].flatten(0, 1))
        hidden = torch.unflatten(hidden, -1, (self.experts, self.rank))
        weighed = (hidden * self.weights(x, p).unsqueeze(-1)).flatten(-2)
        return y + self.scale * linear(weighed, p["B"].movedim(0, 1).flatten(1))
