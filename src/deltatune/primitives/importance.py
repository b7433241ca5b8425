"""Triplets W' = W + s B diag(E) A, and how much each of them matters while it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.policy import Held
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank

__all__ = ["Triplets", "importance"]

_SMOOTHING = 0.85


@dataclass(frozen=True, kw_only=True)
class Triplets(LowRank):
    """What methods whose ranks come and go have in common: A and B at N(0, 0.02²), E at zero.

    Attributes:
        final_rank: entries of E that a site has at the end, in the mean.
        begin: share of the budget of training before the first change.
        end: share of it after the last.
        every: steps between two changes.
        orthogonality: weight of the penalty, the mean distance of A Aᵀ and Bᵀ B to I, as PEFT's.
    """

    final_rank: int = 8
    begin: float = 0.1
    end: float = 0.3
    every: int = 10
    orthogonality: float = 0.5

    count: ClassVar[str] = "r (i + d + 1)"

    def check(self) -> None:
        """Raises ConfigurationError for a final rank above the rank, or shares that leave nothing
        between them.
        """
        super().check()
        if not 1 <= self.final_rank <= self.rank or self.every < 1:
            raise ConfigurationError(
                f"{self.name}: final_rank lies in 1 to rank={self.rank}, every is at least 1; "
                f"found final_rank={self.final_rank}, every={self.every}."
            )
        if self.begin < 0 or self.end <= 0 or self.begin + self.end >= 1:
            raise ConfigurationError(
                f"{self.name}: begin and end are shares that leave something between them, end "
                f"above 0; found begin={self.begin}, end={self.end}."
            )

    def passed(self, done: float) -> float:
        """How far the time between begin and end has passed: below 0 before it, 1 behind it."""
        return min((done - self.begin) / (1 - self.begin - self.end), 1.0)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """A [rank, inputs], B [outputs, rank] and E [rank]. Raises TargetError as LowRank does."""
        A, B = super().init(site).values()
        return {
            "A": normal(*A.shape, std=0.02),
            "B": normal(*B.shape, std=0.02),
            "E": zeros(self.rank),
        }

    def factors(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """diag(E) A and s B."""
        return p["E"].unsqueeze(-1) * p["A"], self.scale * p["B"]

    def penalty(self, sites: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
        """The weighted mean over the factors of all sites."""
        eye = torch.eye(self.rank, device=sites[0]["A"].device)
        grams = [gram for p in sites for gram in (p["A"] @ p["A"].mT, p["B"].mT @ p["B"])]
        return self.orthogonality * torch.stack([(gram - eye).norm() for gram in grams]).mean()

    def smoothed(self, sites: Sequence[Held]) -> dict[str, Tensor]:
        """The first values of what `importance` keeps: mean and deviation of each leaf."""
        return {
            f"{k}.{name}": torch.stack([torch.zeros_like(held.values[name])] * 2)
            for k, held in enumerate(sites)
            for name in ("A", "B", "E")
        }


def importance(sites: Sequence[Held], memory: Mapping[str, Tensor]) -> Tensor:
    """[sites, rank]: of each triplet that of its E and the means over its row of A and its column
    of B; each the product of smoothed |w dL/dw| and its smoothed deviation. This step is added.
    """
    found = []
    for k, held in enumerate(sites):
        scores: dict[str, Tensor] = {}
        for name, gradient in held.gradients.items():
            mean, deviation = memory[f"{k}.{name}"]
            now = (held.values[name] * gradient).abs()
            mean.lerp_(now, 1 - _SMOOTHING)
            deviation.lerp_((now - mean).abs(), 1 - _SMOOTHING)
            scores[name] = mean * deviation
        found.append(scores["E"] + scores["A"].mean(1) + scores["B"].mean(0))
    return torch.stack(found)
