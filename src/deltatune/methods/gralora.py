"""GraLoRA: W cut into k by k blocks, each with a low-rank difference of its own.

Jung et al. 2025, arXiv:2505.20355. Block (i, j) gets (alpha / rank) B_ij A_ij of rank r / k, so
that as many entries are trained as by LoRA of rank r, and the whole may have a rank of up to k r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("gralora")
@dataclass(frozen=True, kw_only=True)
class GraLoRA(LowRank, Method):
    """A grid of low-rank differences.

    Attributes:
        blocks: k, by which the rank and both widths are divided.
    """

    blocks: int = 2

    def check(self) -> None:
        super().check()
        if self.blocks < 1 or self.rank % self.blocks:
            raise ConfigurationError(
                f"gralora: rank={self.rank} is to be a multiple of blocks={self.blocks}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        k, r = self.blocks, self.rank // self.blocks
        if site.inputs % k or site.outputs % k:
            raise TargetError(
                f"gralora: blocks={k} does not divide both widths of {site.path}, "
                f"{site.inputs} and {site.outputs}."
            )
        i, o = site.inputs // k, site.outputs // k
        return {"A": uniform(k, k, r, i, bound=i**-0.5), "B": zeros(k, k, o, r)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        return W + self.product(p).transpose(1, 2).reshape(W.shape), b
