"""The biases of a model, those that are missing among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Category, ReviewCategory
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site

__all__ = ["Biases"]


@dataclass(frozen=True, kw_only=True)
class Biases:
    """What methods that train biases have in common.

    Attributes:
        create: whether missing biases are created; else only those that exist are trained.
    """

    create: bool = True

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    default_at: ClassVar[str] = "linear | norm"
    learning_rate: ClassVar[float] = 3e-3

    def select(self, site: Site) -> Mapping[str, Form]:
        """A difference of the bias; of one that is missing, from zero."""
        exists = site.parameters.get("bias") is not None
        could = self.create and site.parameters.get("weight") is not None
        return {"bias": Difference()} if exists or could else {}

    def idle(self, site: Site, leaf: str) -> bool:
        """The bias of keys shifts all scores of a query alike, which a softmax does not see."""
        return site.part == "k"
