"""Adapter, Pfeiffer placement: y' = y + U σ(D y + c) + e after the feed-forward only.

Pfeiffer et al. 2020, arXiv:2005.00247. One bottleneck per block, half the cost of Houlsby's two. In
pre-norm models theirs reads the stream behind the residual, `at='residual'`. In post-norm models
(BERT) it reads LN(x) of x = h + y and runs the block's norm twice: LN(x + U σ(D LN(x) + c) + e),
which is `twice=True` at that norm. By default the bottleneck reads y itself, as OpenDelta's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from deltatune.core.errors import TargetError
from deltatune.core.leaf import Leaf, fixed
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("pfeiffer")
@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottleneck, Method):
    """A bottleneck behind every feed-forward.

    Attributes:
        twice: whether it stands at norms, each of which is run again behind it; their weight and
            bias are stored with the delta, and not trained.
        eps: of those norms.
    """

    twice: bool = False
    eps: float = 1e-12

    aliases: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter", "single_adapter", "seq_bn")
    default_at: ClassVar[str] = "ffn"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        leaves = super().init(site)
        if not self.twice:
            return leaves
        norm, eps = site.module, getattr(site.module, "eps", None)
        if (
            not isinstance(norm, nn.LayerNorm)
            or norm._parameters["bias"] is None
            or eps != self.eps
        ):
            raise TargetError(
                f"pfeiffer: twice=True stands at a LayerNorm with a bias and eps={self.eps}; "
                f"{site.path} is {norm}. Name norms, and their eps."
            )
        own = {"g": norm.weight, "s": norm.bias}
        return {**leaves, **{name: fixed((site.outputs,), _Own(v)) for name, v in own.items()}}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        z = self.apply(y, p)
        return layer_norm(x + z, p["g"].shape, p["g"], p["s"], self.eps) if "g" in p else y + z


@dataclass(frozen=True, eq=False)
class _Own:
    """Starts as a parameter of the backbone."""

    value: Tensor

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        return torch.zeros(shape) if self.value.is_meta else self.value.detach().float().clone()
