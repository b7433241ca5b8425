"""Adapter, Pfeiffer placement: y' = y + U σ(D y + c) + e after the feed-forward only.

Pfeiffer et al. 2020, arXiv:2005.00247: one bottleneck per block, half the cost of Houlsby's two. In
pre-norm models this is their equation. In post-norm models (BERT) theirs reads LN(h + y) and runs
the block's norm twice; here the bottleneck reads y itself, as OpenDelta's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Category, Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import activation, bottleneck, bottleneck_leaves


@register("pfeiffer")
@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Method):
    """A bottleneck behind every feed-forward.

    Attributes:
        bottleneck: m, the width in the middle.
        activation: σ: relu in the paper; gelu, silu, tanh or identity.
        up_std: standard deviation of U at the start; 0 is the exact identity.
        bias: whether c and e exist.
    """

    bottleneck: int = 64
    activation: str = "relu"
    up_std: float = 0.0
    bias: bool = True

    category: ClassVar[Category] = "addition"
    default_at: ClassVar[str] = "ffn"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        activation(self.activation)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        m, d = self.bottleneck, site.outputs
        return bottleneck_leaves(d, m, d, bias=self.bias, up_std=self.up_std)

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        added = bottleneck(y, p, self.activation)
        return y + added
