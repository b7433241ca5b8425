"""AdapterDrop, specialised: adapters behind the sublayers of all blocks but the first n.

Rücklé et al. 2021, arXiv:2010.11918. The first n blocks keep no activations, and where several
tasks share a base they are computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("adapter_drop")
@dataclass(frozen=True, kw_only=True)
class AdapterDrop(Bottleneck, Method):
    """A bottleneck behind every sublayer of the upper blocks.

    Attributes:
        dropped: n, blocks of each stack without one.
    """

    activation: str = "gelu"
    dropped: int = 5

    def check(self) -> None:
        super().check()
        if self.dropped < 0:
            raise ConfigurationError(f"adapter_drop: dropped is 0 or more; found {self.dropped}.")

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        blocks = [-1 if site.block is None else site.block for site in sites]
        kept = [site for site, k in zip(sites, blocks, strict=True) if k >= self.dropped]
        if not kept:
            raise TargetError(
                f"adapter_drop: no block is left behind the first {self.dropped} of "
                f"{max(blocks) + 1}. Choose fewer."
            )
        return kept

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.apply(y, p)
