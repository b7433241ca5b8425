"""LoRA-GA: W' = W + (alpha / rank) (B A - B0 A0), A0 and B0 singular vectors of the gradient of W.

Wang et al. 2024, arXiv:2407.05000. A0 has the first r right singular vectors and B0 the next r left
ones, both times d^(1/4) / √gamma, so that a first step of gradient descent moves W along the best
approximation of its gradient of rank 2 r. The gradient is that of the mean loss over the first
`rows` rows of the training data. The authors take B0 A0 out of W, which stays as it is here, and
scale by alpha / √rank; PEFT multiplies B0 by singular values instead of scaling A0. Before training
A0 and B0 are zero, which is LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf
from deltatune.core.method import Method, register
from deltatune.core.policy import Found, Kind
from deltatune.core.site import Site
from deltatune.primitives.from_data import FromData
from deltatune.primitives.spectral import Recentred, triplets


@register("lora_ga")
@dataclass(frozen=True, kw_only=True)
class LoRAGA(FromData, Recentred, Method):
    """LoRA whose first step is nearest to that of full fine-tuning.

    Attributes:
        gamma: the larger, the smaller the start.
        rows: see FromData.
    """

    gamma: float = 16.0
    rows: int = 64

    surveys: ClassVar[Kind] = "gradients"

    def check(self) -> None:
        super().check()
        if self.gamma <= 0:
            raise ConfigurationError(f"lora_ga: gamma must be above 0; it is {self.gamma}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        widest = min(site.inputs, site.outputs)
        if 2 * self.rank > widest:
            raise TargetError(
                f"lora_ga: {site.path} maps {site.inputs} features to {site.outputs}; the gradient "
                f"has no {2 * self.rank} singular vectors. Choose a rank of 1 to {widest // 2}."
            )
        return super().init(site)

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:
        del memory
        for found in sites:
            gradient = found.seen["gradients"].double()
            U, _, V = triplets(gradient, slice(2 * self.rank))
            size = len(gradient) ** 0.25 / self.gamma**0.5
            self.begin(found.values, size * V[: self.rank], size * U[:, self.rank :])
