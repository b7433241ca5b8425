"""AdaLoRA: W' = W + (alpha / rank) B diag(E) A, the least important entries of E set to zero.

Zhang et al. 2023, arXiv:2303.10512. E starts at zero, A and B at N(0, 0.02²). The importance of an
entry is its own and the means of those of its row of A and its column of B, each the product of
smoothed |w dL/dw| and its smoothed deviation. What all sites keep falls cubically from rank to
final_rank a site; what was cut off may come back until the last phase. The scale stays that of the
first rank. The penalty is PEFT's: the mean distance of A Aᵀ and Bᵀ B to I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.core.policy import Held, Moment
from deltatune.primitives.importance import Triplets, importance


@register("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Triplets, Method):
    """A low-rank difference whose ranks go where they are needed."""

    rank: int = 12
    alpha: float = 24.0

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        kept = torch.stack([torch.ones_like(held.values["E"]) for held in sites])
        return {**self.smoothed(sites), "kept": kept}

    def on_step(self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment) -> None:
        scores = importance(sites, memory)
        passed, kept = self.passed(moment.done), memory["kept"]
        last = passed >= 1
        if passed < 0 or (moment.step % self.every and not last):
            return
        surplus = (self.rank - self.final_rank) * len(sites)
        budget = int(surplus * (1 - passed) ** 3 + self.final_rank * len(sites))
        if not last or int(kept.sum()) > budget:
            kept.zero_().view(-1)[scores.flatten().topk(budget).indices] = 1.0
        for held, own in zip(sites, kept, strict=True):
            held.values["E"].mul_(own)
