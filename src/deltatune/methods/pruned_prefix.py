"""Pruned prefix: K' = [P_K; K], V' = [P_V; V], a share of the entries of P kept.

Lawton et al. 2023, arXiv:2305.16597. The prefix of their U-MAM and S-MAM; `u_mam` and `s_mam` have
the adapter beside it. Chosen as in `pruned_parallel`, single entries (U) or whole tokens
(S, `structured`), a key and its value. A token that is off has a key and a value of zero: it keeps
the share of attention that a score of zero has. The prefix is trained itself, without an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.pruning import FirstOrder


@register("pruned_prefix")
@dataclass(frozen=True, kw_only=True)
class PrunedPrefix(FirstOrder, Method):
    """The entries of trained keys and values that matter; with `structured` whole tokens.

    Attributes:
        length: tokens before the turn.
    """

    length: int = 20

    axes: ClassVar[Mapping[str, int]] = {"K": 0, "V": 0}
    from_zero: ClassVar[bool] = False
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "L (k + v), a share kept"
    default_at: ClassVar[str] = "attention"
    learning_rate: ClassVar[float] = 1e-2
    identity: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.length < 1:
            raise ConfigurationError(f"pruned_prefix: length is at least 1; it is {self.length}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        widths = {"K": site.key_width, "V": site.value_width}
        return {name: normal(self.length, width, std=0.02) for name, width in widths.items()}

    def attend(self, p: Leaves) -> tuple[Tensor, ...]:
        return p["K"], p["V"]
