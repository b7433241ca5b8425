"""SHiRA: W' = W + S, S zero but for r (in + out) entries at random places.

Bhardwaj et al. 2024, arXiv:2406.13175. Its random mask: as many entries as LoRA of rank r has, and
of high rank. The places are drawn once and stored; the entries start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, places, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("shira")
@dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """A sparse difference.

    Attributes:
        rank: r, of the LoRA that has as many entries.
    """

    rank: int = 8

    aliases: ClassVar[tuple[str, ...]] = ("sparse_high_rank",)
    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "r (i + d)"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 3e-3

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"shira: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        count, entries = self.rank * (site.inputs + site.outputs), site.inputs * site.outputs
        if count > entries:
            raise TargetError(
                f"shira: {site.path} has {entries} entries, and rank={self.rank} asks for {count}. "
                f"Choose 1 to {entries // (site.inputs + site.outputs)}."
            )
        return {"S": zeros(count), "places": places(count, entries)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return W.flatten().index_add(0, p["places"], p["S"].to(W.dtype)).view_as(W), b
