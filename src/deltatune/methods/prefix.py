"""Prefix tuning: K' = [P_K; K], V' = [P_V; V] in every attention.

Li and Liang 2021, arXiv:2101.00190. With `reparameterise`, all prefixes of a stack come from one
embedding through tanh(P W1ᵀ + b1) W2ᵀ + b2 while training, and only the prefixes are stored. Under
grouped-query attention the widths are those of keys and values. Rotary keys of a prefix are not
rotated. It has no identity: the text attends to it from the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, uniform, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("prefix")
@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Trained keys and values in front of those of the text.

    Attributes:
        length: how many.
        reparameterise: whether an MLP makes them while training.
        middle: the width of that MLP.
        embedding: the width of what it reads; 0 for that of the model.
        bias: whether it has biases.
        per: stack or model: what has an MLP of its own.
    """

    length: int = 20
    reparameterise: bool = False
    middle: int = 512
    embedding: int = 0
    bias: bool = True
    per: str = "stack"

    aliases: ClassVar[tuple[str, ...]] = ("prefix_tuning", "prefix_tuning_flat", "pf")
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "L (k + v)"
    default_at: ClassVar[str] = "attention"
    learning_rate: ClassVar[float] = 1e-2
    identity: ClassVar[bool] = False

    def check(self) -> None:
        if self.length < 1 or self.middle < 1 or self.embedding < 0:
            raise ConfigurationError(f"prefix: length and middle must be at least 1; found {self}.")
        if self.per not in ("stack", "model"):
            raise ConfigurationError(f"prefix: per must be stack or model; it is {self.per!r}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        k, v = site.key_width, site.value_width
        if not self.reparameterise:
            return {"K": normal(self.length, k, std=0.02), "V": normal(self.length, v, std=0.02)}
        width, middle = self.embedding or site.inputs, self.middle
        tie = site.stack if self.per == "stack" else "model"
        leaves = {
            "P": normal(self.length, width, std=1.0).tied(tie),
            "W1": uniform(middle, width, bound=width**-0.5).tied(tie),
            "W2": uniform(k + v, middle, bound=middle**-0.5),
        }
        return leaves | ({"b1": zeros(middle).tied(tie), "b2": zeros(k + v)} if self.bias else {})

    def attend(self, p: Leaves) -> tuple[Tensor, ...]:
        if not self.reparameterise:
            return p["K"], p["V"]
        made = linear(torch.tanh(linear(p["P"], p["W1"], p.get("b1"))), p["W2"], p.get("b2"))
        k, v = made.chunk(2, dim=-1)
        return k, v

    def stored(self) -> Method:
        return Prefix(at=self.at, length=self.length)

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        k, v = self.attend(p)
        return {"K": k, "V": v}
