"""Intrinsic prompt tuning, second stage: P = W2 tanh(W1 z + b1) + b2, where z alone is trained.

Qin et al. 2021, arXiv:2110.07867. In the first stage the authors train the decoder W1, b1, W2, b2
on the prompts of many tasks, with weights that all tasks share; a bank has no such leaf, so that
stage is not here. The decoder is drawn as torch draws its layers, which leaves a random subspace;
write a trained one into the leaves of the bank to have the authors' second stage. z starts at
N(0, 0.02²). Only the tokens are stored, as a `prompt`: an artefact holds no decoder. No identity.
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
    """Tokens that a frozen decoder makes of a trained vector.

    Attributes:
        dimension: n, the entries of the vector.
        middle: the width of the decoder.
    """

    dimension: int = 250
    middle: int = 768

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    learning_rate: ClassVar[float] = 1e-2
    count: ClassVar[str] = "n, once"

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
            drawn = uniform(outputs, inputs, bound=inputs**-0.5)
            leaves[f"W{k}"] = replace(drawn, trained=False)
            leaves[f"b{k}"] = replace(uniform(outputs, bound=inputs**-0.5), trained=False)
        return leaves

    def embed(self, p: Leaves) -> Tensor:
        hidden = torch.tanh(linear(p["z"], p["W1"], p["b1"]))
        return linear(hidden, p["W2"], p["b2"]).view(self.length, -1)
