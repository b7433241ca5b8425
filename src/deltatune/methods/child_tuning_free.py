"""Child-Tuning, task-free: W' = W + D, in every step a random share of the gradient's entries.

Xu et al. 2021, arXiv:2109.05687. Variant F of the paper: g is multiplied by a mask of
Bernoulli(share) / share, drawn anew in every step, before the optimiser reads it. In the mean that
is g. D is dense in the end: it spares neither memory nor storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.policy import Held, Moment
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site


@register("child_tuning_free")
@dataclass(frozen=True, kw_only=True)
class FreeChildTuning(Method):
    """All parameters of the blocks, by masked gradients.

    Attributes:
        share: of the entries that have a gradient in a step.
    """

    share: float = 0.3

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the module"
    aliases: ClassVar[tuple[str, ...]] = ("child_tuning_f",)
    default_at: ClassVar[str] = "block.linear | block.norm"
    learning_rate: ClassVar[float] = 3e-4

    def check(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigurationError(
                f"child_tuning_free: share lies in (0, 1]; it is {self.share}."
            )

    def select(self, site: Site) -> Mapping[str, Form]:
        return {name: Difference() for name, value in site.parameters.items() if value is not None}

    def on_gradients(
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> bool:
        for held in sites:
            for name, gradient in held.gradients.items():
                random = moment.draws.of(held.site.name, name)
                mask = torch.rand(gradient.shape, generator=random) < self.share
                gradient.mul_(mask.to(gradient) / self.share)
        return False
