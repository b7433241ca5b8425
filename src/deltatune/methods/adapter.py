"""Adapter, Houlsby placement: y' = y + U σ(D y + c) + e after every sublayer, before its residual.

Houlsby et al. 2019, arXiv:1902.00751. The sublayers are attention (self and cross) and
feed-forward; y is the output of their last projection. U starts at zero, so that the start is
exactly the identity; the authors draw it with standard deviation 1e-3 (`up_std`). They also train
the norms: add `bitfit(at='norm')`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.bottleneck import Bottleneck


@register("adapter")
@dataclass(frozen=True, kw_only=True)
class Adapter(Bottleneck, Method):
    """A bottleneck behind every sublayer."""

    activation: str = "gelu"

    aliases: ClassVar[tuple[str, ...]] = ("houlsby", "sequential_adapter", "double_seq_bn", "ap")

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.apply(y, p)
