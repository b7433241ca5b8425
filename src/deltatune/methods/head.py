"""A task head: the classifier's W' and b', drawn afresh, trained and saved with the delta.

Devlin et al. 2019, arXiv:1810.04805. Every fine-tuned encoder has one. A backbone's classifier is
as wide as the widest label set it must serve; a head for fewer labels masks the rest, so that heads
of different tasks stand in one bank and one batch.

A regression's bias begins at the mean label. From zero, every gradient asks first for that mean,
and a delta below the head learns it before the bias does, by making all texts alike: at 1.5e-3 LoRA
on all-MiniLM-L6-v2 ended with a correlation of 0.02 on STS-B, and ends with 0.80 from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, constant, fixed, normal
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.core.storage import storage_of

_MASKED = -1e4  # finite in fp16, and no probability is left after the softmax


@register("head")
@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """A classifier of its own.

    Attributes:
        labels: how many of the classifier's outputs are the task's; 1 for regression.
        start: where their biases begin; for a regression the mean of the training labels.
    """

    labels: int = 2
    start: float = 0.0

    aliases: ClassVar[tuple[str, ...]] = ("linear_probing",)
    category: ClassVar[Category] = "head"
    review_category: ClassVar[ReviewCategory] = "head"
    count: ClassVar[str] = "id + d"
    default_at: ClassVar[str] = "head"
    learning_rate: ClassVar[float] = 1e-3
    identity: ClassVar[bool] = False
    slot_fields: ClassVar[tuple[str, ...]] = ("labels", "start")

    def check(self) -> None:
        if self.labels < 1:
            raise ConfigurationError(f"head: labels must be at least 1; it is {self.labels}.")

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [site for site in sites if storage_of(site.module).linear][-1:]

    def init(self, site: Site) -> Mapping[str, Leaf]:
        if self.labels > site.outputs:
            raise TargetError(
                f"The head {site.path} has {site.outputs} outputs; {self.labels} labels do not "
                "fit. Load the backbone with as many labels as its widest task has."
            )
        return {
            "weight": normal(site.outputs, site.inputs, std=0.02),
            "bias": constant(site.outputs, value=self.start),
            "mask": fixed((site.outputs,), _Mask(self.labels)),
        }

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return p["weight"], p["bias"] + p["mask"]


@dataclass(frozen=True)
class _Mask:
    labels: int

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        return torch.where(torch.arange(shape[0]) < self.labels, 0.0, _MASKED)
