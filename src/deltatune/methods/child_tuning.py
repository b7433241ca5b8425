"""Child-Tuning, task-driven: W' = W + D, D zero but where the Fisher information is large.

Xu et al. 2021, arXiv:2109.05687. Variant D of the paper. The information is the mean of g² over the
steps before the turn, in which nothing moves, of clipped gradients of batches, as in the authors'
code. The share is kept of all sites together. Variant F, fresh masks in every step, is
`child_tuning_free`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.pruning import Pruned


@register("child_tuning")
@dataclass(frozen=True, kw_only=True)
class ChildTuning(Pruned, Method):
    """A sparse difference at the entries that the task depends on."""

    share: float = 0.3
    turn: float = 0.1

    aliases: ClassVar[tuple[str, ...]] = ("child_tuning_d",)
    burning: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-4

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        score.addcmul_(gradient, gradient)
