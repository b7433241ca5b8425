"""Gains and shifts of a map's output: y' = w ⊙ y + e."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, ones, zeros
from deltatune.core.method import Category, ReviewCategory
from deltatune.core.site import Site

__all__ = ["Gains"]


class Gains:
    """What methods of this form have in common; a method says where they act."""

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "2 d"
    learning_rate: ClassVar[float] = 3e-3

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """w, one, and e, zero, [outputs] each."""
        return {"w": ones(site.outputs), "e": zeros(site.outputs)}

    def weight(
        self, W: Tensor, b: Tensor | None, p: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The rows of W and b scaled, b shifted."""
        return p["w"].unsqueeze(-1) * W, p["e"] if b is None else p["w"] * b + p["e"]

    def fast(self, x: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """The output scaled and shifted."""
        del x
        return p["w"].unsqueeze(-2) * y + p["e"].unsqueeze(-2)
