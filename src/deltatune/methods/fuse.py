"""Fusion: y' = y + Σ_k a_k (c_k(x, y) - y), a = softmax_k((Q y + q) · K (c_k(x, y) - y)).

Pfeiffer et al. 2021, arXiv:2005.00247. AdapterFusion over members of any methods. The
authors' are trained before (`start_from`) and stay as they are (`frozen=True`); fresh ones change
nothing at first, and frozen they never would. `adapter_fusion` is the authors' own, with a value
projection V, and equals this one at V = I. Q and K start from N(0, 0.02²).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Leaves, register
from deltatune.core.mixer import Mixer
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.text import Text


@register("fuse")
@dataclass(frozen=True, kw_only=True)
class Fuse(Mixer):
    """An attention of what a site gives over what its members add to it."""

    category: ClassVar = "addition"
    review_category: ClassVar = "hybrid"
    count: ClassVar[str] = "2 d² + d"
    learning_rate: ClassVar[float] = 5e-5
    compares: ClassVar[bool] = True

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d = site.outputs
        return {"Q": normal(d, d, std=0.02), "q": zeros(d), "K": normal(d, d, std=0.02)}

    def idle(self, site: Site, leaf: str) -> bool:
        return site.members == 1

    def mix(self, x: Tensor, z: Tensor | None, text: Text | None, p: Leaves) -> Tensor:
        assert z is not None
        y, added = z[..., 0, :], z[..., 1:, :]
        scores = linear(added, p["K"]) @ linear(y, p["Q"], p["q"]).unsqueeze(-1)
        return scores.squeeze(-1).softmax(-1)
