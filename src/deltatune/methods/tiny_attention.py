"""Tiny-attention adapter: y' = y + Σ_h softmax((q_h y)(k_h Y)ᵀ) (v_h Y) o_h behind every attention.

Zhao et al. 2022, arXiv:2211.01979. Heads of width one read the tokens that their host may read: not
padding, and in a decoder none that come later; a sliding window of the host is not kept to. o
starts at zero, q, k and v keep the variance of their input. The authors average the heads into one
for inference, which changes the function: an export that is not made here. While a decoder
generates, keys and values lie in a layer of the model's own cache.
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


@register("tiny_attention")
@dataclass(frozen=True, kw_only=True)
class TinyAttention(Method):
    """An attention with heads of width one.

    Attributes:
        heads: how many.
    """

    heads: int = 4

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "attention"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "4 heads d"

    def check(self) -> None:
        if self.heads < 1:
            raise ConfigurationError(
                f"tiny_attention: heads must be at least 1; it is {self.heads}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d = site.outputs
        return {"qkv": normal(3 * self.heads, d, std=d**-0.5), "o": zeros(d, self.heads)}

    def show(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        return linear(y, p["qkv"])

    def read(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        assert text.shown is not None
        return y + linear(attend(text.shown, text.sees, self.heads), p["o"])
