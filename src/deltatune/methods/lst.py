"""Ladder side-tuning: s_j = Side_j(g_j s_{j-1} + (1 - g_j) R_j y_j) beside the blocks, and
y' = y + U s behind the last.

Sung et al. 2022, arXiv:2206.06522. The side network reads what every block gives and changes none
but the last, so that no gradient goes through the blocks. g_j = sigmoid(a_j / 0.1) starts at a half
and s_0 = R_0 x. A side block is an attention and a feed-forward with a norm in front of each, d / r
wide; its attention has no positions of its own. In an encoder-decoder there is one ladder for each
stack; the decoder's reads the encoder's by a cross-attention, and alone adds. U starts at zero, so
that the start is the identity, where the authors' output is the side network's alone; they begin
from the pruned weights of the backbone, here maps are drawn. While a decoder generates, what its
tokens have read so far lies in a layer of the model's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear, relu, rms_norm

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, normal, ones, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.core.text import Text
from deltatune.primitives.attention import attend, attend_to

_TEMPERATURE = 0.1


@register("lst")
@dataclass(frozen=True, kw_only=True)
class LST(Method):
    """A narrow network beside the blocks.

    Attributes:
        reduction: r, how many times narrower than the model.
        heads: of its attentions; divides d / r.
    """

    reduction: int = 8
    heads: int = 4

    aliases: ClassVar[tuple[str, ...]] = ("ladder_side_tuning",)
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "residual"
    learning_rate: ClassVar[float] = 3e-3
    count: ClassVar[str] = "dm + 12m² + 2m + 1, m = d / r; cross-attention 4m² + m; 2dm + m once"

    def check(self) -> None:
        if self.reduction < 1 or self.heads < 1:
            raise ConfigurationError(f"lst: reduction and heads are at least 1; found {self}.")

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        firsts = {site.stack: site for site in reversed(sites)}
        return [
            replace(
                site,
                allotted={
                    "R_0": site is firsts[site.stack],
                    "Q": site.stack == "decoder" and "encoder" in firsts,
                    "U": site is sites[-1],
                },
            )
            for site in sites
        ]

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d, m = site.outputs, site.outputs // self.reduction
        if not m or m % self.heads or site.outputs % self.reduction:
            raise TargetError(
                f"lst: heads={self.heads} must divide d / r, and reduction={self.reduction} the "
                f"width; {site.path} is {d} wide."
            )
        shapes = {"R": (m, d), "qkv": (3 * m, m), "o": (m, m), "D": (4 * m, m), "E": (m, 4 * m)}
        shapes |= {"R_0": (m, d)} if site.allotted["R_0"] else {}
        shapes |= {"Q": (m, m), "KV": (2 * m, m), "C": (m, m)} if site.allotted["Q"] else {}
        norms = ["n_1", "n_2", *(["n_3"] if site.allotted["Q"] else [])]
        last = {"U": zeros(d, m), "n": ones(m)} if site.allotted["U"] else {}
        maps = {name: normal(*shape, std=shape[1] ** -0.5) for name, shape in shapes.items()}
        return {"gate": zeros(1), **maps, **{name: ones(m) for name in norms}, **last}

    def show(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        g = (p["gate"] / _TEMPERATURE).sigmoid()
        before = linear(x, p["R_0"]) if text.carried is None else text.carried
        return g * before + (1 - g) * linear(y, p["R"])

    def carry(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        assert text.shown is not None
        shown = linear(_normed(text.shown, p["n_1"]), p["qkv"])
        s = text.shown[..., -text.tokens :, :]
        s = s + linear(attend(shown, text.sees, self.heads), p["o"])
        if "Q" in p and text.source is not None and text.source.carried is not None:
            k, v = linear(text.source.carried, p["KV"]).chunk(2, dim=-1)
            q, real = linear(_normed(s, p["n_3"]), p["Q"]), text.source.real.unsqueeze(-2)
            sees = (real | ~real.any(-1, keepdim=True)).expand(-1, text.tokens, -1)
            s = s + linear(attend_to(q, k, v, sees, self.heads), p["C"])
        return s + linear(relu(linear(_normed(s, p["n_2"]), p["D"])), p["E"])

    def read(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        if "U" not in p or text.carried is None:
            return y
        return y + linear(_normed(text.carried, p["n"]), p["U"])


def _normed(s: Tensor, gain: Tensor) -> Tensor:
    return rms_norm(s, gain.shape, gain, 1e-6)
