"""Selective-module tuning: W' = v for modules drawn at random until a budget is spent, v starting
at W.

Ding et al. 2023, Nature Machine Intelligence. Matrices of attention and feed-forward and norms, of
all blocks, without replacement. The draw depends on the seed and on the names of the modules alone,
not on their order. The budget is passed by at most one module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import generator
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form, Values
from deltatune.core.site import Site


@register("selective_module")
@dataclass(frozen=True, kw_only=True)
class SelectiveModule(Method):
    """Whole modules, drawn at random.

    Attributes:
        budget: the share of the candidates' parameters to tune, in (0, 1].
        seed: of the draw.
    """

    budget: float = 0.05
    seed: int = 0

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the module"
    default_at: ClassVar[str] = "block.linear | block.norm"
    learning_rate: ClassVar[float] = 3e-4

    def check(self) -> None:
        if not 0 < self.budget <= 1:
            raise ConfigurationError(
                f"selective_module: budget must lie in (0, 1]; it is {self.budget}."
            )

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        named = sorted(sites, key=lambda site: site.name)
        sizes = [
            sum(
                math.prod(shape)
                for name in site.parameters
                if (shape := site.shape(name)) is not None
            )
            for site in named
        ]
        order = torch.randperm(
            len(named), generator=generator("selective_module", self.seed)
        ).tolist()
        chosen, spent = set[int](), 0
        for index in order:
            if spent >= self.budget * sum(sizes):
                break
            chosen.add(index)
            spent += sizes[index]
        names = {named[index].name for index in chosen}
        return [site for site in sites if site.name in names]

    def select(self, site: Site) -> Mapping[str, Form]:
        return {key: Values() for key, held in site.parameters.items() if held is not None}
