"""BitFit: b' = b + d for every bias, everything else frozen.

Ben-Zaken et al. 2021, arXiv:2106.10199. Where a linear layer or a norm has no bias (T5, Llama) one
is created as zero, so that the start is the identity (OpenDelta draws it at random). The bias of
keys has a zero gradient in plain softmax attention: it shifts all scores of a query alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site


@register("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trained biases.

    Attributes:
        create: whether missing biases are created; else only those that exist are trained.
    """

    create: bool = True

    aliases: ClassVar[tuple[str, ...]] = ("bias_tuning",)
    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "d"
    default_at: ClassVar[str] = "linear | norm"
    learning_rate: ClassVar[float] = 3e-3

    def select(self, site: Site) -> Mapping[str, Form]:
        exists = site.parameters.get("bias") is not None
        could = self.create and site.parameters.get("weight") is not None
        return {"bias": Difference()} if exists or could else {}

    def idle(self, site: Site, leaf: str) -> bool:
        return site.part == "k"
