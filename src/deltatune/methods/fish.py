"""FISH mask: W' = W + D, D zero but at the entries of the largest Fisher information.

Sung et al. 2021, arXiv:2111.09839. The information of an entry is the mean over rows of the squared
gradient of a row's loss, over the first `rows` rows of the training data, one at a time, with the
labels that they have (empirical); a row's loss is the mean over its target tokens. The mask is
chosen once, of all sites together, before the first step. The authors look at 1024 rows. A
difference that was trained or loaded moves where it is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.policy import Found, Held, Kind, Moment
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site
from deltatune.primitives.from_data import FromData
from deltatune.primitives.pruning import entries, masks


@register("fish")
@dataclass(frozen=True, kw_only=True)
class FISH(FromData, Method):
    """A sparse difference at entries that are chosen before training.

    Attributes:
        share: of the entries that move, over all sites together.
        rows: see FromData.
    """

    share: float = 0.005
    rows: int = 256

    surveys: ClassVar[Kind] = "squares"
    aliases: ClassVar[tuple[str, ...]] = ("fish_mask",)
    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the module, a share kept"
    default_at: ClassVar[str] = "block.linear | block.norm"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigurationError(f"fish: share lies in (0, 1]; it is {self.share}.")

    def select(self, site: Site) -> Mapping[str, Form]:
        return {name: Difference() for name, value in site.parameters.items() if value is not None}

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:
        found = list(entries([Held(one.site, one.values, one.seen) for one in sites]))
        chosen = masks([squares for *_, squares in found], self.share)
        for (name, *_), mask in zip(found, chosen, strict=True):
            memory[name].copy_(mask)

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        return {name: value != 0 for name, value, _ in entries(sites)}

    def on_gradients(
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> bool:
        for name, _, gradient in entries(sites):
            gradient.mul_(memory[name])
        return False

    def on_step(self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment) -> None:
        for name, value, _ in entries(sites):
            value.mul_(memory[name])
