"""Adapter, Houlsby placement: y' = y + U σ(D y + c) + e after every sublayer, before its residual.

Houlsby et al. 2019, arXiv:1902.00751. The sublayers are attention (self and cross) and
feed-forward; y is the output of their last projection. U starts at zero, so that the start is
exactly the identity; the authors draw it with standard deviation 1e-3 (`up_std`). They also train
the norms: add `bitfit(at='norm')`.
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


@register("adapter")
@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """A bottleneck behind every sublayer.

    Attributes:
        bottleneck: m, the width in the middle.
        activation: σ: gelu, relu, silu, tanh or identity.
        bias: whether c and e exist.
        up_std: standard deviation of U at the start; 0 is the exact identity.
    """

    bottleneck: int = 64
    activation: str = "gelu"
    bias: bool = True
    up_std: float = 0.0

    category: ClassVar[Category] = "addition"
    default_at: ClassVar[str] = "attention | ffn"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        activation(self.activation)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        width = site.outputs
        return bottleneck_leaves(width, self.bottleneck, width, bias=self.bias, up_std=self.up_std)

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + bottleneck(y, p, self.activation)
