"""ProPETL: y' = y + (U ⊙ M_U) σ((D ⊙ M_D) y + c) + e, all but the masks shared by all sites.

Zeng et al. 2023, arXiv:2305.17682. The prototype, an adapter, is one; every site sees it through
masks of its own, which keep the largest |scores| of a map. Scores start uniformly, get the gradient
of the mask straight through, and train faster by a factor of 3, as in the authors' code; there,
too, biases have no mask. Masks of tasks, joined to these, are not here. A saved delta holds masks
as bits: it acts as the trained one did, and trains its prototype alone. U starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, uniform
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.binary_masks import all_on, packed, through, unpacked
from deltatune.primitives.bottleneck import Bottleneck


@register("propetl")
@dataclass(frozen=True, kw_only=True)
class ProPETL(Bottleneck, Method):
    """One bottleneck behind all sublayers, a part of it behind each.

    Attributes:
        kept: the share of each map that a site uses, in (0, 1].
        packed: whether the masks stand as bits, all on at the start, with no scores: the form that
            is saved.
    """

    activation: str = "gelu"
    kept: float = 0.5
    packed: bool = False

    aliases: ClassVar[tuple[str, ...]] = ("prototype_adapter",)
    review_category: ClassVar[ReviewCategory] = "unified"
    count: ClassVar[str] = "2dm; 2dm + m + d once"

    def check(self) -> None:
        super().check()
        if not 0 < self.kept <= 1:
            raise ConfigurationError(f"propetl: kept lies in (0, 1]; it is {self.kept}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        leaves = super().init(site)
        tied = {name: leaf.tied(f"{site.outputs}") for name, leaf in leaves.items()}
        for name in ("D", "U"):
            shape = leaves[name].shape
            scores = uniform(*shape, bound=shape[1] ** -0.5)
            tied[f"mask_{name}"] = all_on(*shape) if self.packed else scores
        return tied

    def rate(self, leaf: str) -> float:
        return 3.0 if leaf.startswith("mask") else 1.0

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        seen = {name: p[name] * self._mask(p[f"mask_{name}"], p[name]) for name in ("D", "U")}
        return y + self.apply(y, {**p, **seen})

    def stored(self) -> Method:
        return replace(self, packed=True)

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        masks = [name for name in p if name.startswith("mask") and not self.packed]
        return {**p, **{name: packed(self._on(p[name])) for name in masks}}

    def _mask(self, mask: Tensor, like: Tensor) -> Tensor:
        return unpacked(mask, like) if self.packed else through(self._on(mask), mask.abs())

    def _on(self, scores: Tensor) -> Tensor:
        worth = scores.abs()
        count = max(1, round(self.kept * worth.numel()))
        return worth >= worth.flatten().topk(count).values[-1]
