"""U-BitFit and S-BitFit: b' = b + d for a share of the biases, chosen in training.

Lawton et al. 2023, arXiv:2305.16597. All biases are trained up to the turn; |Σ d dL/dd| over those
steps, what undoing a difference would cost in first order, chooses entries (U) or, summed over
each, whole vectors (S, `structured`). These begin again at zero. The learning rate goes on where it
was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site
from deltatune.primitives.pruning import Pruned


@register("pruned_bitfit")
@dataclass(frozen=True, kw_only=True)
class PrunedBitFit(Pruned, Method):
    """The biases that matter.

    Attributes:
        structured: whether whole vectors are chosen.
        create: whether missing biases are created; else only those that exist are trained.
    """

    share: float = 0.5
    structured: bool = False
    create: bool = True

    count: ClassVar[str] = "d, a share kept"
    aliases: ClassVar[tuple[str, ...]] = ("u_bitfit", "s_bitfit")
    default_at: ClassVar[str] = "linear | norm"
    learning_rate: ClassVar[float] = 3e-3

    def select(self, site: Site) -> Mapping[str, Form]:
        exists = site.parameters.get("bias") is not None
        could = self.create and site.parameters.get("weight") is not None
        return {"bias": Difference()} if exists or could else {}

    def idle(self, site: Site, leaf: str) -> bool:
        return site.part == "k"

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        score.add_(value * gradient)

    def worth(self, score: Tensor) -> Tensor:
        return score.sum().abs().expand_as(score) if self.structured else score.abs()
