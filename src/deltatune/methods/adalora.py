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
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.policy import Held, Moment
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank

_SMOOTHING = 0.85


@register("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank, Method):
    """A low-rank difference whose ranks go where they are needed.

    Attributes:
        final_rank: entries of E that a site keeps, in the mean.
        orthogonality: weight of the penalty.
        begin: share of the budget of training before the first cut.
        end: share of it after the last.
        every: steps between two cuts.
    """

    rank: int = 12
    alpha: float = 24.0
    final_rank: int = 8
    orthogonality: float = 0.5
    begin: float = 0.1
    end: float = 0.3
    every: int = 10

    count: ClassVar[str] = "r (i + d + 1)"

    def check(self) -> None:
        super().check()
        if not 1 <= self.final_rank <= self.rank or self.every < 1:
            raise ConfigurationError(
                f"adalora: final_rank lies in 1 to rank={self.rank} and every is at least 1; found "
                f"final_rank={self.final_rank}, every={self.every}."
            )
        if self.begin < 0 or self.end < 0 or self.begin + self.end >= 1:
            raise ConfigurationError(
                "adalora: begin and end are shares that leave something between them; found "
                f"begin={self.begin}, end={self.end}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        A, B = super().init(site).values()
        return {
            "A": normal(*A.shape, std=0.02),
            "B": normal(*B.shape, std=0.02),
            "E": zeros(self.rank),
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["E"].unsqueeze(-1) * p["A"], self.scale * p["B"]

    def penalty(self, sites: Sequence[Leaves]) -> Tensor | None:
        eye = torch.eye(self.rank, device=sites[0]["A"].device)
        grams = [gram for p in sites for gram in (p["A"] @ p["A"].mT, p["B"].mT @ p["B"])]
        return self.orthogonality * torch.stack([(gram - eye).norm() for gram in grams]).mean()

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        smoothed = {
            f"{k}.{name}": torch.stack([torch.zeros_like(held.values[name])] * 2)
            for k, held in enumerate(sites)
            for name in ("A", "B", "E")
        }
        return {**smoothed, "kept": torch.stack([torch.ones_like(h.values["E"]) for h in sites])}

    def on_step(self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment) -> None:
        scores = torch.stack([_scores(k, held, memory) for k, held in enumerate(sites)])
        last, kept = moment.done >= 1 - self.end, memory["kept"]
        if moment.done < self.begin or (moment.step % self.every and not last):
            return
        budget = self._budget(moment.done, len(sites))
        if not last or int(kept.sum()) > budget:
            kept.zero_().view(-1)[scores.flatten().topk(budget).indices] = 1.0
        for held, own in zip(sites, kept, strict=True):
            held.values["E"].mul_(own)

    def _budget(self, done: float, sites: int) -> int:
        """Entries of E of all sites together when so much of training is done."""
        passed = min((done - self.begin) / (1 - self.begin - self.end), 1.0)
        surplus = (self.rank - self.final_rank) * sites
        return int(surplus * (1 - passed) ** 3 + self.final_rank * sites)


def _scores(k: int, held: Held, memory: Mapping[str, Tensor]) -> Tensor:
    """The importance of each entry of E at site k, this step having been added to the means."""
    found: dict[str, Tensor] = {}
    for name, gradient in held.gradients.items():
        mean, deviation = memory[f"{k}.{name}"]
        now = (held.values[name] * gradient).abs()
        mean.lerp_(now, 1 - _SMOOTHING)
        deviation.lerp_((now - mean).abs(), 1 - _SMOOTHING)
        found[name] = mean * deviation
    return found["E"] + found["A"].mean(1) + found["B"].mean(0)
