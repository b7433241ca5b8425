"""Adapter, Pfeiffer placement: y' = y + U σ(D y + c) + e after the feed-forward only.

Pfeiffer et al. 2020, arXiv:2005.00247. One bottleneck per block, half the cost of Houlsby's two. In
pre-norm models this is their equation. In post-norm models (BERT) theirs reads LN(h + y) and runs
the block's norm twice; here the bottleneck reads y itself, as OpenDelta's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.bottleneck import Bottleneck


@register("pfeiffer")
@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottleneck, Method):
    """A bottleneck behind every feed-forward."""

    aliases: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter", "single_adapter", "seq_bn")
    default_at: ClassVar[str] = "ffn"

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.apply(y, p)
