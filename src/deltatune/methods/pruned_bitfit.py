"""U-BitFit and S-BitFit: b' = b + d for a share of the biases, chosen in training.

Lawton et al. 2023, arXiv:2305.16597. All biases are trained up to the turn; |Σ d dL/dd| over those
steps, what undoing a difference would cost in first order, chooses entries (U) or, summed over
each, whole vectors (S, `structured`). These begin again at zero. The learning rate goes on where it
was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Method, register
from deltatune.primitives.biases import Biases
from deltatune.primitives.pruning import FirstOrder


@register("pruned_bitfit")
@dataclass(frozen=True, kw_only=True)
class PrunedBitFit(Biases, FirstOrder, Method):
    """The biases that matter; with `structured` whole vectors of them."""

    count: ClassVar[str] = "d, a share kept"
    aliases: ClassVar[tuple[str, ...]] = ("u_bitfit", "s_bitfit")
