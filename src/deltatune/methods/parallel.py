"""Parallel adapter: y' = y + s (U σ(D x + c) + e), from the input of a sublayer to its output.

He et al. 2022, arXiv:2110.04366 (scaled parallel adapter, there with m = 512 and s = 4). In
pre-norm models x is what the sublayer sees, behind the norm.
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


@register("parallel")
@dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    """A bottleneck beside every feed-forward.

    Attributes:
        bottleneck: m, the width in the middle.
        scale: s, by which it is multiplied.
        activation: σ: relu in the paper; gelu, silu, tanh or identity.
        bias: whether c and e exist.
        up_std: standard deviation of U at the start; 0 is the exact identity.
    """

    bottleneck: int = 64
    scale: float = 4.0
    activation: str = "relu"
    bias: bool = True
    up_std: float = 0.0

    category: ClassVar[Category] = "addition"
    default_at: ClassVar[str] = "ffn"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        activation(self.activation)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return bottleneck_leaves(
            site.inputs, self.bottleneck, site.outputs, bias=self.bias, up_std=self.up_std
        )

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.scale * bottleneck(x, p, self.activation)
