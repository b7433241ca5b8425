"""Robust prefix-tuning: a prefix that is tuned anew for every batch, min Σ_j |h_j - Q_j h_j|².

Yang and Liu 2022, arXiv:2203.10378. Q_j projects what block j gives on the axes of the training
rows that the prefix answers correctly; `survey_activations` of `core.adapting` finds them when it
is trained, `strayed` is the sum, and `adapting` takes steps on it and undoes them: the authors take
5 of Adam at 5e-5, without labels. As they add a prefix that starts at zero, here keys and values
move from where they were trained. They look at the output position of a decoder; which one that is,
and the mean that stands for it in an encoder, is said in `core.adapting`. Until the survey Q_j is
the identity, from which nothing strays. No identity at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, fixed, identity, normal
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.policy import Found
from deltatune.core.site import Site


@register("robust_prefix")
@dataclass(frozen=True, kw_only=True)
class RobustPrefix(Method):
    """A prefix that knows the activations of its training.

    Attributes:
        length: L, keys and values of each attention.
        share: of the squared length of activations that the axes explain, in (0, 1].
    """

    length: int = 20
    share: float = 0.99

    aliases: ClassVar[tuple[str, ...]] = ("robust_prefix_tuning",)
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    default_at: ClassVar[str] = "attention"
    count: ClassVar[str] = "L (k + v)"
    review_category: ClassVar[ReviewCategory] = "additive"
    category: ClassVar[Category] = "addition"

    def check(self) -> None:
        if self.length < 1 or not 0 < self.share <= 1:
            raise ConfigurationError(
                f"robust_prefix: length is at least 1 and share in (0, 1]; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        if site.block is None:
            raise TargetError(
                f"robust_prefix looks behind the block of an attention; {site.path} is in none."
            )
        d = site.inputs
        return {
            "K": normal(self.length, site.key_width, std=0.02),
            "V": normal(self.length, site.value_width, std=0.02),
            "Q": fixed((d, d), identity).tied(f"{site.stack}.{site.block}"),
        }

    def attend(self, p: Leaves) -> tuple[Tensor, ...]:
        return p["K"], p["V"]

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:
        del memory
        for found in sites:
            lengths, axes = torch.linalg.eigh(found.seen["activations"])
            explained = lengths.clamp_min(0).flip(0).cumsum(0)
            short = explained < self.share * explained[-1]
            kept = axes[:, -min(int(short.sum()) + 1, len(lengths)) :]
            found.values["Q"].copy_(kept @ kept.mT)

    def stray(self, h: Tensor, p: Leaves) -> Tensor:
        return (h - h @ p["Q"].mT).float().square().sum()
