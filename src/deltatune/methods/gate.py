"""Gates: y' = y + Σ_k g_k (c_k(x, y) - y), g = σ(W x + b), over the members c_k at a site.

Mao et al. 2021, arXiv:2110.07577. Each member has a gate of its own; `unipelt` is three of them.
Where all tokens of a text are seen at once the gate is their mean, padding apart (the authors' mean
holds it too); where later ones are not seen, and with `tokenwise`, every token has its own. Of a
prefix the authors multiply keys and values, which leaves the softmax its share at g = 0; here g
multiplies that share, so that g = 0 is the attention without it. W starts from N(0, 0.02²), b at
zero: gates near one half, a weaker member and no identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Leaves, register
from deltatune.core.mixer import Mixer
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.text import Text


@register("gate")
@dataclass(frozen=True, kw_only=True)
class Gate(Mixer):
    """A weight between zero and one for each member, from what the site reads.

    Attributes:
        tokenwise: whether every token has its own everywhere.
    """

    tokenwise: bool = False

    category: ClassVar = "addition"
    review_category: ClassVar = "hybrid"
    count: ClassVar[str] = "n (i + 1)"
    learning_rate: ClassVar[float] = 1e-3

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {"W": normal(site.members, site.inputs, std=0.02), "b": zeros(site.members)}

    def reads(self) -> bool:
        return not self.tokenwise

    def mix(self, x: Tensor, z: Tensor | None, text: Text | None, p: Leaves) -> Tensor:
        del z
        gates = linear(x, p["W"], p["b"]).sigmoid()
        if text is None or text.causal:
            return gates
        real = text.real.unsqueeze(-1)
        mean = (gates * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
        return mean.expand_as(gates)
