"""X-LoRA: y' = y + Σ_k g_k (c_k(x, y) - y), g = softmax(W h + b) of what a first pass without the
delta makes of a token.

Buehler and Buehler 2024, arXiv:2402.07148. h are the last hidden states of the token stack; the
members are LoRAs, trained before and frozen (`fill_expert`, `frozen=True`), or any methods. One W
for all sites, or with `layerwise` one for each, both as in PEFT, whose deeper classifiers, dropout
and temperatures are left out. Every call runs the stack twice, and while a model generates the
first pass reads the whole text again (PEFT refuses a cache). Where a site reads another text, as
the keys of a cross-attention do, h is what it reads. W starts from N(0, 0.02²), near equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.errors import TargetError
from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Leaves, register
from deltatune.core.mixer import Mixer
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.text import Text


# What multi-head latent attention makes anew of its cache for every token.
_CACHED = ("k", "v", "k&v")


@register("x_lora")
@dataclass(frozen=True, kw_only=True)
class XLoRA(Mixer):
    """Weights that share one among the members, from what the backbone makes of the text.

    Attributes:
        layerwise: whether every site has weights of its own.
    """

    layerwise: bool = False

    category: ClassVar = "addition"
    review_category: ClassVar = "hybrid"
    count: ClassVar[str] = "n (d + 1)"
    learning_rate: ClassVar[float] = 1e-3
    foresees: ClassVar[bool] = True

    def init(self, site: Site) -> Mapping[str, Leaf]:
        tie = None if self.layerwise else f"{site.stack}, {site.members} members"
        if not site.width:
            raise TargetError(
                "x_lora weighs by the last hidden states of the backbone, and its configuration "
                "names no hidden_size. Use route, which reads what a site reads."
            )
        if site.inputs != site.width and site.place is not None and site.place.part in _CACHED:
            raise TargetError(
                f"x_lora: {site.path} reads the latent vectors of all tokens so far, and there are "
                "weights for the new ones alone. Choose members without it, or use gate."
            )
        own = {"W": normal(site.members, site.width, std=0.02), "b": zeros(site.members)}
        return {name: replace(leaf, tie=tie) for name, leaf in own.items()}

    def idle(self, site: Site, leaf: str) -> bool:
        return site.members == 1

    def reads(self) -> bool:
        return True

    def mix(self, x: Tensor, z: Tensor | None, text: Text | None, p: Leaves) -> Tensor:
        hidden = x if text is None or text.first is None else text.first
        return linear(hidden.to(x.dtype), p["W"], p["b"]).softmax(-1)
