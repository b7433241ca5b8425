"""IncreLoRA: W' = W + (alpha / rank) B diag(E) A, the ranks of a site growing while it is trained.

Zhang et al. 2023, arXiv:2308.12043. Every site begins with one rank; the sites whose ranks matter
most are given another, until final_rank a site are there in the mean, at most rank at one. The next
rank of each site is trained beforehand with E = 1e-5, so that its coming leaves the function as it
is. The authors score the whole difference by its own gradient, which no factor gives; here a site
counts as the mean importance of its ranks, that of AdaLoRA, and the scale does not change as ranks
come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.core.policy import Held, Moment
from deltatune.primitives.importance import Triplets, importance

_WAITING = 1e-5  # E of a rank that is trained beforehand


@register("increlora")
@dataclass(frozen=True, kw_only=True)
class IncreLoRA(Triplets, Method):
    """A low-rank difference that gets ranks where they are needed.

    Attributes:
        rank: the most that one site may have.
    """

    rank: int = 16
    alpha: float = 32.0

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        there = torch.stack([torch.zeros_like(held.values["E"]) for held in sites])
        there[:, 0] = 1.0
        return {**self.smoothed(sites), "there": there}

    def on_gradients(
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> bool:
        for held, own in zip(sites, memory["there"], strict=True):
            held.gradients["E"].mul_(own)
        return False

    def on_step(self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment) -> None:
        there, scores = memory["there"], importance(sites, memory)
        passed = self.passed(moment.done)
        if passed >= 1 or (passed >= 0 and moment.step % self.every == 0):
            wanted = len(sites) + int((self.final_rank - 1) * len(sites) * passed)
            _grow(there, (scores * there).sum(1) / there.sum(1), wanted)
        for held, own in zip(sites, there, strict=True):
            E, count = held.values["E"], int(own.sum())
            E[count:] = 0.0
            E[count : count + 1] = _WAITING if passed < 1 else 0.0


def _grow(there: Tensor, worth: Tensor, wanted: int) -> None:
    """Gives a rank to the best sites that have room, once and again, until all are there."""
    while (missing := wanted - int(there.sum())) > 0:
        room = (there.sum(1) < there.shape[1]).nonzero().flatten()
        for site in room[worth[room].argsort(descending=True)][:missing]:
            there[site, int(there[site].sum())] = 1.0
