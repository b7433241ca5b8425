"""SAM, the second-order approximation method: W' = W + D, D zero but for the steepest entries.

Fu et al. 2022, arXiv:2211.15583. The entries whose own second-order step lowers the loss most are
those of the largest g² / |h|; with h = 1, as the authors' code has it, those of the largest |g|, g
summed over the steps before the turn, in which nothing moves. The share is kept of every tensor.
The sum is of clipped gradients. Not sharpness-aware minimisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.pruning import Pruned


@register("sam")
@dataclass(frozen=True, kw_only=True)
class SAM(Pruned, Method):
    """A sparse difference at the entries of the largest gradient."""

    burning: ClassVar[bool] = True
    per_tensor: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        score.add_(gradient)
