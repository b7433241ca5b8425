"""Parallel adapter: y' = y + s (U σ(D x + c) + e), from the input of a sublayer to its output.

He et al. 2022, arXiv:2110.04366. The scaled parallel adapter, there with m = 512 and s = 4. In
pre-norm models x is what the sublayer sees, behind the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("parallel")
@dataclass(frozen=True, kw_only=True)
class Parallel(Bottleneck, Method):
    """A bottleneck beside every feed-forward.

    Attributes:
        scale: s, by which it is multiplied.
    """

    scale: float = 4.0

    aliases: ClassVar[tuple[str, ...]] = ("parallel_adapter", "par_bn", "scaled_pa", "pa")
    count: ClassVar[str] = "im + md + m + d"
    default_at: ClassVar[str] = "ffn"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return self.leaves(site.inputs, site.outputs)

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.scale * self.apply(x, p)
