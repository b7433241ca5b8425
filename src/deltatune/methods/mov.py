"""MoV, a mixture of (IA)3: y' = y ⊙ (1 + Σ_n g_n(x) l_n), g(x) = softmax(R x) for every token.

Zadouri et al. 2023, arXiv:2309.05444. The l are gains less one, so that they start at zero and the
start is exactly the identity. The router reads what the map reads. The authors scale what
`ffn.down` reads; here the gains act on what `ffn.up` gives, which is the same in a gated
feed-forward, and with ReLU for gains that stay positive. With `chosen` a token takes only the
experts of the largest weights. There is no loss that balances them, and nothing can be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.leaf import Leaf, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.experts import Routed


@register("mov")
@dataclass(frozen=True, kw_only=True)
class MoV(Routed, Method):
    """Gains of keys, values and the inner activation, mixed anew for every token."""

    aliases: ClassVar[tuple[str, ...]] = ("mixture_of_vectors",)
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "n (i + d)"
    default_at: ClassVar[str] = "attention.k | attention.v | ffn.up"
    learning_rate: ClassVar[float] = 3e-3

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {"l": zeros(self.experts, site.outputs), **self.router(site)}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + y * linear(self.weights(x, p), p["l"].mT)
