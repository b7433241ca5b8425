"""ATTEMPT: [T + Σ_j a_j P_j; E(x)], a = softmax_j(max_t P_j · LN(W_2 SiLU(W_1 max_t E(x))) / τ).

Asai et al. 2022, arXiv:2205.11961. P_j are frozen prompts of n source tasks, and T, one more of
them, the target's own; `fill_expert` of `core.start` copies each source from a trained `prompt`;
until then they are drawn from the vocabulary, as T is. x is the prompt alone: where answers stand
behind it, in a decoder, they are not read. W_1, W_2 and the norm train at a tenth of the rate, the
authors' at one of their own; they may train them on the source tasks first, which is to start from
such a delta. All is stored, sources too. No identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, ones, uniform, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.core.text import Text
from deltatune.primitives.experts import several
from deltatune.primitives.virtual_tokens import vocabulary


@register("attempt")
@dataclass(frozen=True, kw_only=True)
class Attempt(Method):
    """An attention of every text over prompts of other tasks.

    Attributes:
        length: L, of every prompt.
        sources: n, how many prompts of other tasks.
        middle: m, the width of the map that makes a query of the text.
        temperature: τ as a multiple of the width of the model.
    """

    length: int = 20
    sources: int = 6
    middle: int = 100
    temperature: float = math.e

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "L d + 2dm + 2d, once"
    default_at: ClassVar[str] = "embedding"
    learning_rate: ClassVar[float] = 3e-2
    identity: ClassVar[bool] = False

    def check(self) -> None:
        if min(self.length, self.sources, self.middle) < 1 or self.temperature <= 0:
            raise ConfigurationError(
                "attempt: length, sources and middle are at least 1, and temperature is above 0; "
                f"found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d, m, prompt = site.inputs, self.middle, vocabulary(site, self.length)
        return {
            "P": replace(several({"P": prompt}, self.sources)["P"], trained=False),
            "T": prompt,
            "W1": uniform(m, d, bound=d**-0.5),
            "W2": uniform(d, m, bound=m**-0.5),
            "gain": ones(d),
            "shift": zeros(d),
        }

    def rate(self, leaf: str) -> float:
        return 1.0 if leaf == "T" else 0.1

    def embed_for(self, x: Tensor, text: Text, p: Leaves) -> Tensor:
        d, read = x.shape[-1], text.prompt.unsqueeze(-1)
        most = x.masked_fill(~read, -torch.inf).amax(1).masked_fill(~read.any(1), 0.0)
        inner = linear(silu(linear(most, p["W1"])), p["W2"])
        query = layer_norm(inner, (d,), p["gain"], p["shift"])
        prompts = torch.cat([p["P"], p["T"].unsqueeze(0)])
        scores = linear(query, prompts.amax(1)) / (self.temperature * d)
        return p["T"] + torch.einsum("bn,nld->bld", scores.softmax(-1), prompts)
