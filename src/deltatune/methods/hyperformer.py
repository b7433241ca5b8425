"""HyperFormer++: y' = y + g ⊙ LN(U σ(D y + c) + e) + s, all made by one hypernetwork.

Karimi Mahabadi et al. 2021, arXiv:2106.04489. I = LN(MLP([task; block; sublayer])), and one linear
map makes D, U, c, e, g and s of a site from I; it is shared by all sites of one width. What a site
has of its own are embeddings of its block and of its sublayer. All but the task's embedding is in
common in a bank with `sharing="method"`, as the authors train it on several tasks. Only the
adapters that were made are stored. The map that makes g and s starts at zero, so that the start is
the identity; the authors draw it with standard deviation 0.01, as all other maps are drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal, ones, zeros
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck

_SHARED = ("block", "sublayer", "W1", "b1", "W2", "b2", "norm", "offset", "W", "b", "V", "v")


@register("hyperformer")
@dataclass(frozen=True, kw_only=True)
class HyperFormer(Bottleneck, Method):
    """Bottlenecks that a hypernetwork makes while training.

    Attributes:
        embedding: t, the width of the embeddings of task, block and sublayer.
        middle: the width of the MLP.
        code: the width of I.
        generate: whether the hypernetwork makes the bottlenecks; else they are leaves themselves.
    """

    bottleneck: int = 24
    embedding: int = 64
    middle: int = 128
    code: int = 64
    generate: bool = True

    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "self_attention | ffn"
    learning_rate: ClassVar[float] = 3e-4
    shared_leaves: ClassVar[tuple[str, ...]] = _SHARED
    count: ClassVar[str] = "t per block and sublayer; a hypernetwork once"

    def check(self) -> None:
        super().check()
        if min(self.embedding, self.middle, self.code) < 1 or not self.bias or self.up_std:
            raise ConfigurationError(
                "hyperformer: embedding, middle and code must be at least 1, and biases are "
                f"made with the rest: bias=True, up_std=0; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        t, m, d = self.embedding, self.bottleneck, site.outputs
        if not self.generate:
            norm = {"gain": zeros(d), "shift": zeros(d)}
            return {**self.leaves(d, d), "U": normal(d, m, std=m**-0.5), **norm}
        place = site.place
        block, sublayer = (None, None) if place is None else (place.block, place.sublayer)
        return {
            "task": normal(t, std=1.0).tied("model"),
            "block": normal(t, std=1.0).tied(f"{site.stack}.{block}"),
            "sublayer": normal(t, std=1.0).tied(f"{sublayer}"),
            "W1": normal(self.middle, 3 * t, std=0.01).tied("model"),
            "b1": zeros(self.middle).tied("model"),
            "W2": normal(self.code, self.middle, std=0.01).tied("model"),
            "b2": zeros(self.code).tied("model"),
            "norm": ones(self.code).tied("model"),
            "offset": zeros(self.code).tied("model"),
            "W": normal(2 * d * m + m + d, self.code, std=0.01).tied(f"{d}"),
            "b": zeros(2 * d * m + m + d).tied(f"{d}"),
            "V": zeros(2 * d, self.code).tied(f"{d}"),
            "v": zeros(2 * d).tied(f"{d}"),
        }

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        made = self.made(y.shape[-1], p)
        inner = layer_norm(self.apply(y, made), y.shape[-1:], made["gain"], made["shift"])
        return y + inner

    def made(self, width: int, p: Leaves) -> Leaves:
        """The leaves of a bottleneck and its norm, from those of the hypernetwork."""
        if not self.generate:
            return p
        known = torch.cat([p["task"], p["block"], p["sublayer"]])
        inside = linear(torch.relu(linear(known, p["W1"], p["b1"])), p["W2"], p["b2"])
        inside = layer_norm(inside, inside.shape, p["norm"], p["offset"])
        m, d = self.bottleneck, width
        maps = linear(inside, p["W"], p["b"])
        D, U, c, e = torch.split(maps, [m * d, d * m, m, d])
        gain, shift = linear(inside, p["V"], p["v"]).chunk(2)
        return {"D": D.view(m, d), "U": U.view(d, m), "c": c, "e": e, "gain": gain, "shift": shift}

    def stored(self) -> Method:
        return HyperFormer(
            at=self.at,
            strength=self.strength,
            bottleneck=self.bottleneck,
            activation=self.activation,
            generate=False,
        )

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        return self.made(site.outputs, p)
