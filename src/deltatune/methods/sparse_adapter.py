"""SparseAdapter: y' = y + (U ⊙ M_U) σ((D ⊙ M_D) y + c) + e, the masks M fixed from the start.

He et al. 2022, arXiv:2210.04284. The masks are drawn at random, the same share off in every map.
The paper finds SNIP better, whose scores need gradients on data before training: `snip_adapter`.
What is off is neither trained nor stored, and biases have no mask. The paper's Large-Sparse setting
is a wider bottleneck at a higher sparsity: `sparse_adapter(bottleneck=256, sparsity=0.75)` costs as
many weights as `adapter(bottleneck=64)`. D starts as that of an adapter, U at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, places
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("sparse_adapter")
@dataclass(frozen=True, kw_only=True)
class SparseAdapter(Bottleneck, Method):
    """A bottleneck behind every sublayer, most of whose weights are off.

    Attributes:
        sparsity: the share of the entries of D and U that is off, in [0, 1).
    """

    activation: str = "gelu"
    sparsity: float = 0.8

    review_category: ClassVar[ReviewCategory] = "unified"
    count: ClassVar[str] = "2dm, a share kept; m + d"

    def check(self) -> None:
        super().check()
        if not 0 <= self.sparsity < 1:
            raise ConfigurationError(
                f"sparse_adapter: sparsity lies in [0, 1); it is {self.sparsity}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        leaves = dict(super().init(site))
        entries = leaves["D"].count
        kept = max(1, round((1 - self.sparsity) * entries))
        for name in ("D", "U"):
            leaves[name] = replace(leaves[name], shape=(kept,))
            leaves[f"places_{name}"] = places(kept, entries)
        return leaves

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        d, m = y.shape[-1], self.bottleneck
        maps = {"D": _spread(p, "D", m, d), "U": _spread(p, "U", d, m)}
        return y + self.apply(y, {**p, **maps})


def _spread(p: Leaves, name: str, rows: int, columns: int) -> Tensor:
    """The map with its entries at their places, zero elsewhere."""
    empty = p[name].new_zeros(rows * columns)
    return empty.scatter(0, p[f"places_{name}"], p[name]).view(rows, columns)
