"""LT-SFT: W' = W + D, D zero but for the entries that moved most when all were trained.

Ansell et al. 2022, arXiv:2110.07560. Lottery-ticket sparse fine-tuning. Everything is trained up to
the turn; the share that lies farthest from its start is kept, goes back and is trained alone. One
round, where the authors may take several; the learning rate goes on where it was. Training takes
the memory of full tuning; what is stored is the kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.pruning import Pruned


@register("lt_sft")
@dataclass(frozen=True, kw_only=True)
class LTSFT(Pruned, Method):
    """A sparse difference at the entries that move most."""

    share: float = 0.05
    turn: float = 0.5

    aliases: ClassVar[tuple[str, ...]] = ("lottery_ticket",)
    learning_rate: ClassVar[float] = 3e-4

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        score.copy_(value)
