"""Intrinsic prompt tuning: P = W2 tanh(W1 z + b1) + b2, where a task's vector z alone is trained.

Qin et al. 2021, arXiv:2110.07867. In their first stage all tasks train one decoder W1, b1, W2, b2:
`decoder=True` in a bank with `sharing="method"`. The authors encode trained prompts of the tasks
for z, and ask the decoder to give those back too; here z of each task is trained. A delta without
`decoder` that starts from one with it (`core.start`) is their second stage; else the decoder is
drawn as torch draws its layers, which leaves a random subspace. z starts at N(0, 0.02²). Only the
tokens are stored, as a `prompt`, unless it is saved `as_trained`. No identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, uniform
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.virtual_tokens import MadeTokens


@register("intrinsic_prompt")
@dataclass(frozen=True, kw_only=True)
class IntrinsicPrompt(MadeTokens, Method):
    """Tokens that a decoder makes of a vector.

    Attributes:
        dimension: n, the entries of the vector.
        middle: the width of the decoder.
        decoder: whether the decoder is trained too.
    """

    dimension: int = 250
    middle: int = 768
    decoder: bool = False

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    learning_rate: ClassVar[float] = 1e-2
    count: ClassVar[str] = "n, once; the decoder too in the first stage"
    shared_leaves: ClassVar[tuple[str, ...]] = ("W1", "b1", "W2", "b2")
    training_fields: ClassVar[tuple[str, ...]] = ("decoder",)

    def check(self) -> None:
        super().check()
        if min(self.dimension, self.middle) < 1:
            raise ConfigurationError(
                f"intrinsic_prompt: dimension and middle must be at least 1; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        widths = (self.dimension, self.middle, self.length * site.inputs)
        leaves = {"z": normal(self.dimension, std=0.02)}
        for k in (1, 2):
            inputs, outputs = widths[k - 1], widths[k]
            weight, bias = (
                uniform(*s, bound=inputs**-0.5) for s in ((outputs, inputs), (outputs,))
            )
            leaves[f"W{k}"] = replace(weight, trained=self.decoder)
            leaves[f"b{k}"] = replace(bias, trained=self.decoder)
        return leaves

    def embed(self, p: Leaves) -> Tensor:
        hidden = torch.tanh(linear(p["z"], p["W1"], p["b1"]))
        return linear(hidden, p["W2"], p["b2"]).view(self.length, -1)
