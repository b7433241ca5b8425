"""LLaMA-Adapter: o' = o + tanh(g) softmax(q (W_k P)ᵀ) W_v P at every attention, before W_o.

Zhang et al. 2024, arXiv:2303.16199. A prompt of each layer goes through its frozen projections of
keys and values, with their biases and deltas, has a softmax of its own, and is let in by a gate
that starts at zero: the start is the identity, and the gate moves first. P starts at N(0, 1). Its
keys are not rotated, nor normed where a model norms keys by the head. The authors have a gate for
every head, here as in PEFT it is one for every layer; PEFT leaves tanh out, takes the bias of W_o
twice, and passes W_o by in GPT-2. The default target is the last 30 blocks, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("llama_adapter")
@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(Method):
    """A gated prompt beside every attention.

    Attributes:
        length: L, its tokens.
    """

    length: int = 10

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "block[-30:].self_attention"
    learning_rate: ClassVar[float] = 1e-2
    count: ClassVar[str] = "L i + 1"
    projected: ClassVar[bool] = True

    def check(self) -> None:
        if self.length < 1:
            raise ConfigurationError(
                f"llama_adapter: length must be at least 1; it is {self.length}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        if not site.projections:
            raise UnsupportedError(
                f"llama_adapter: {site.path} makes keys and values of a latent vector, which a "
                "prompt as wide as the model is not. Use prefix, whose keys and values are trained."
            )
        return {"P": normal(self.length, site.inputs, std=1.0), "g": zeros(1, 1)}

    def attend(self, p: Leaves) -> tuple[Tensor, ...]:
        return p["P"], p["P"], torch.tanh(p["g"])
