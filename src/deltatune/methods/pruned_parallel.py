"""Pruned parallel adapter: y' = y + s (U σ(D x + c) + e), a share of its entries kept.

Lawton et al. 2023, arXiv:2305.16597. The adapter of their U-MAM and S-MAM; `u_mam` and `s_mam` have
the prefix beside it. All entries are trained up to the turn; |Σ w dL/dw| over those steps chooses
entries (U) or, summed over each, hidden units (S, `structured`): a row of D, its entry of c and its
column of U, and e as a whole. These begin again where they began, all others are zero. The share is
that of the adapter alone. The learning rate goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck
from deltatune.primitives.pruning import FirstOrder


@register("pruned_parallel")
@dataclass(frozen=True, kw_only=True)
class PrunedParallel(FirstOrder, Bottleneck, Method):
    """The entries of a parallel adapter that matter; with `structured` its hidden units.

    Attributes:
        scale: s, by which it is multiplied.
    """

    scale: float = 4.0

    axes: ClassVar[Mapping[str, int]] = {"D": 0, "c": 0, "U": 1}
    from_zero: ClassVar[bool] = False
    count: ClassVar[str] = "im + md + m + d, a share kept"
    default_at: ClassVar[str] = "ffn"

    def check(self) -> None:
        FirstOrder.check(self)
        Bottleneck.check(self)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return self.leaves(site.inputs, site.outputs)

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.scale * self.apply(x, p)
