"""Projected attention layers: y' = y + V_D MHA(V_E x) beside every block, V_E and V_D shared.

Stickland and Murray 2019, arXiv:1902.02671. MHA has queries, keys and values of width m and no
output map. V_D starts at zero. The authors' code has biases and a GELU behind V_D, and in a
post-norm model adds before the block's last norm, here after it. They train the base as well, one
set for each task. The attention reads what a block's own may read; a sliding window is not kept
to. While a decoder generates, keys and values lie in a layer of the model's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.core.text import Text
from deltatune.primitives.attention import attend


@register("pals")
@dataclass(frozen=True, kw_only=True)
class PALs(Method):
    """A narrow attention beside every block.

    Attributes:
        width: m, of the attention.
        heads: how many; divides m.
    """

    width: int = 204
    heads: int = 12

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "residual"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "3m²; 2dm once"

    def check(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ConfigurationError(
                f"pals: heads must divide width, both at least 1; found heads={self.heads}, "
                f"width={self.width}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d, m = site.outputs, self.width
        return {
            "V_E": normal(m, d, std=d**-0.5).tied(f"{d}"),
            "V_D": zeros(d, m).tied(f"{d}"),
            "qkv": normal(3 * m, m, std=m**-0.5),
        }

    def show(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        return linear(linear(x, p["V_E"]), p["qkv"])

    def read(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        assert text.shown is not None
        return y + linear(attend(text.shown, text.sees, self.heads), p["V_D"])
