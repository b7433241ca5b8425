"""Low-rank adapter: a bottleneck with D = s t and U = u v of rank r.

Mahabadi et al. 2021, arXiv:2106.04647. There it is a baseline of Compacter. The factors start as
Glorot does: not at the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.factored import Factored


@register("low_rank_adapter")
@dataclass(frozen=True, kw_only=True)
class LowRankAdapter(Factored, Method):
    """A bottleneck of low rank behind every sublayer.

    Attributes:
        rank: r, of both maps.
    """

    rank: int = 1

    aliases: ClassVar[tuple[str, ...]] = ("adapter_low_rank",)
    count: ClassVar[str] = "2 r (d + m) + m + d"

    def check(self) -> None:
        super().check()
        if self.rank < 1:
            raise ConfigurationError(f"{self.name}: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d, m, r = site.outputs, self.bottleneck, self.rank
        leaves = {}
        for name, *shape in (("s", m, r), ("t", r, d), ("u", d, r), ("v", r, m)):
            leaves[name] = normal(*shape, std=(2 / sum(shape)) ** 0.5)
        return {**leaves, **self.biases(d)}

    def maps(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["s"] @ p["t"], p["u"] @ p["v"]
