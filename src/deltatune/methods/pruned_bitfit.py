"""U-BitFit and S-BitFit: b' = b + d for a share of the biases, chosen in training.

Lawton et al. 2023, arXiv:2305.16597. All biases are trained up to the turn; |Σ d dL/dd| over those
steps, what undoing a difference would cost in first order, chooses entries (U) or, summed over
each, whole vectors (S, `structured`). These begin again at zero. The learning rate goes on where it
was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.biases import Biases
from deltatune.primitives.pruning import Pruned


@register("pruned_bitfit")
@dataclass(frozen=True, kw_only=True)
class PrunedBitFit(Biases, Pruned, Method):
    """The biases that matter.

    Attributes:
        structured: whether whole vectors are chosen.
    """

    share: float = 0.5
    structured: bool = False

    count: ClassVar[str] = "d, a share kept"
    aliases: ClassVar[tuple[str, ...]] = ("u_bitfit", "s_bitfit")

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        score.add_(value * gradient)

    def worth(self, score: Tensor) -> Tensor:
        return score.sum().abs().expand_as(score) if self.structured else score.abs()
