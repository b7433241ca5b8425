"""Masking: W' = W * 1[m >= threshold], scores m trained by the straight-through gradient
dL/dm = dL/dW' * W.

Zhao et al. 2020, arXiv:2004.12406. The weights stay as they are, and a mask selects among them. The
scores start uniformly about the threshold, so that a chosen share of the weights is off; a start at
the identity has a share of 0. The authors leave the lowest blocks and the embeddings alone, which
`at` says. A saved delta holds the mask alone, one bit for each weight: it acts as the trained one
did, and cannot be trained further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, given
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.binary_masks import all_on, packed, through, unpacked


@register("masking")
@dataclass(frozen=True, kw_only=True)
class Masking(Method):
    """A binary mask on a weight.

    Attributes:
        sparsity: the share of the weights that is off at the start, in [0, 1).
        threshold: the score from which a weight is on; the scores start within as much of it.
        packed: whether the mask stands as bits, all on at the start, with nothing to train: the
            form that is saved.
    """

    sparsity: float = 0.05
    threshold: float = 0.01
    packed: bool = False

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    default_at: ClassVar[str] = "block.linear"
    learning_rate: ClassVar[float] = 3e-4
    identity: ClassVar[bool] = False
    count: ClassVar[str] = "i d"

    def check(self) -> None:
        if not 0 <= self.sparsity < 1 or self.threshold <= 0:
            raise ConfigurationError(
                "masking: sparsity must lie in [0, 1) and threshold above 0; they are "
                f"{self.sparsity} and {self.threshold}."
            )
        started = self.sparsity, self.threshold
        if self.packed and started != (Masking.sparsity, Masking.threshold):
            raise ConfigurationError(
                "masking: a packed mask has no scores, so that sparsity and threshold mean "
                "nothing. Leave them out."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        if self.packed:
            return {"mask": all_on(site.outputs, site.inputs)}
        return {"m": given((site.outputs, site.inputs), _About(self.threshold, self.sparsity))}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        if self.packed:
            return W * unpacked(p["mask"], W), b
        return W * through(p["m"] >= self.threshold, p["m"]), b

    def stored(self) -> Method:
        return Masking(at=self.at, strength=self.strength, packed=True)

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        return p if self.packed else {"mask": packed(p["m"] >= self.threshold)}


@dataclass(frozen=True)
class _About:
    threshold: float
    below: float

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        place = torch.rand(shape, generator=random) - self.below
        return self.threshold + 2 * self.threshold * place
