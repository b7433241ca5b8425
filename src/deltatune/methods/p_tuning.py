"""P-tuning v1: [MLP(E); E(x)], or [MLP(BiLSTM(E)); E(x)]: virtual tokens that an encoder makes.

Liu et al. 2021, arXiv:2103.10385. The encoder is there while training; only the tokens are stored,
as a `prompt`. It is PEFT's: the authors' LSTM is half as wide as the model in each direction, and
their templates put tokens behind and between the texts too. Leaves start as torch starts its
layers; a leaf of the LSTM holds both directions. No identity at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, uniform
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.virtual_tokens import MadeTokens


@register("p_tuning")
@dataclass(frozen=True, kw_only=True)
class PTuning(MadeTokens, Method):
    """Tokens that an encoder makes while training.

    Attributes:
        encoder: mlp, of three layers, or lstm, of two, with an MLP of two behind it.
        middle: the width of the encoder; of the LSTM in each direction.
    """

    encoder: str = "mlp"
    middle: int = 128

    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "L d + 2 m d + m² + 2 m + d, once; with the LSTM more"

    def check(self) -> None:
        super().check()
        if self.middle < 1 or self.encoder not in ("mlp", "lstm"):
            raise ConfigurationError(
                f"p_tuning: middle must be at least 1 and encoder mlp or lstm; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d, m = site.inputs, self.middle
        leaves = {"E": normal(self.length, d, std=1.0)}
        if self.encoder == "lstm":
            for layer, inputs in enumerate((d, 2 * m)):
                shapes = {"W": (2, 4 * m, inputs), "U": (2, 4 * m, m), "b": (2, 4 * m)}
                shapes["c"] = shapes["b"]
                leaves |= {f"{n}.{layer}": uniform(*s, bound=m**-0.5) for n, s in shapes.items()}
        widths = (2 * m, 2 * m, d) if self.encoder == "lstm" else (d, m, m, d)
        for k, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            leaves[f"W{k}"] = uniform(outputs, inputs, bound=inputs**-0.5)
            leaves[f"b{k}"] = uniform(outputs, bound=inputs**-0.5)
        return leaves

    def embed(self, p: Leaves) -> Tensor:
        x = p["E"]
        if self.encoder == "lstm":
            way = itertools.product("01", (0, 1))  # a layer forwards, and backwards
            flat = [p[f"{name}.{layer}"][k] for layer, k in way for name in "WUbc"]
            start = x.new_zeros(4, 1, self.middle)
            # Two layers with biases, without dropout, in both directions, over [tokens, 1, width].
            x = torch.lstm(x.unsqueeze(1), (start, start), flat, True, 2, 0.0, True, True, False)[0]
            x = x.squeeze(1)
        k = 1
        while f"W{k + 1}" in p:
            x, k = torch.relu(linear(x, p[f"W{k}"], p[f"b{k}"])), k + 1
        return linear(x, p[f"W{k}"], p[f"b{k}"])
