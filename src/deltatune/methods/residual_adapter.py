"""Residual adapter: y' = y + U σ(D LN(y) + c) + e behind the feed-forward, with a norm of its own.

Lin et al. 2020, arXiv:2004.03829. The norm's gain starts at one and its shift at zero; U at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import layer_norm

from deltatune.core.leaf import Leaf, ones, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("residual_adapter")
@dataclass(frozen=True, kw_only=True)
class ResidualAdapter(Bottleneck, Method):
    """A bottleneck behind a norm of its own."""

    aliases: ClassVar[tuple[str, ...]] = ("vlm_adapter",)
    count: ClassVar[str] = "2dm + m + 3 d"
    default_at: ClassVar[str] = "ffn"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        norm = {"gain": ones(site.outputs), "shift": zeros(site.outputs)}
        return {**self.leaves(site.outputs, site.outputs), **norm}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.apply(layer_norm(y, y.shape[-1:], p["gain"], p["shift"]), p)
