"""P-tuning v1: [MLP(E); E(x)], or [MLP(BiLSTM(E)); E(x)]: virtual tokens that an encoder makes.

Liu et al. 2021, arXiv:2103.10385. The encoder is there while training; only the tokens are stored,
as a `prompt`. It is PEFT's: the authors' LSTM is half as wide as the model in each direction, and
their templates put tokens behind and between the texts too. Leaves start as torch starts its
layers. The LSTM is written out, token by token, so that it is the same in every dtype and under
every transform; each of its two layers takes both directions at once. No identity at the start.
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

_LAYERS = 2  # of the LSTM


@register("p_tuning")
@dataclass(frozen=True, kw_only=True)
class PTuning(MadeTokens, Method):
    """Tokens in front of the text, made by an encoder while training.

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
        x, k = p["E"], 1
        if self.encoder == "lstm":
            for layer in range(_LAYERS):
                x = _both_ways(x, *(p[f"{name}.{layer}"] for name in ("W", "U", "b", "c")))
        while f"W{k + 1}" in p:
            x, k = torch.relu(linear(x, p[f"W{k}"], p[f"b{k}"])), k + 1
        return linear(x, p[f"W{k}"], p[f"b{k}"])


def _both_ways(x: Tensor, W: Tensor, U: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A layer of a bidirectional LSTM: [tokens, inputs] to [tokens, 2 m]. Gates: i, f, g, o."""
    read = torch.stack([x, x.flip(0)]) @ W.mT + (b + c).unsqueeze(1)
    h = s = torch.zeros_like(read[:, 0, : U.shape[-1]])
    states = []
    for t in range(x.shape[0]):
        i, f, g, o = (read[:, t] + (U @ h.unsqueeze(-1)).squeeze(-1)).chunk(4, dim=-1)
        s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(s)
        states.append(h)
    forward, backward = torch.stack(states, dim=1)
    return torch.cat([forward, backward.flip(0)], dim=-1)
