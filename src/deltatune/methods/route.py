"""Router: y' = y + Σ_k g_k(x) (c_k(x, y) - y), g(x) = softmax(R x), over the members c_k at a site.

Zadouri et al. 2023, arXiv:2309.05444. Their mixture of LoRAs (`molora`) and of vectors (`mov`), for
members of any methods: of the same one they are its experts. Weighed for every token anew; with
`chosen` a token takes the members of the largest weights alone. There is no loss that balances
them. Of keys and values the weight multiplies the share that an attention gives them. R starts from
N(0, 0.02²), near uniform weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, normal
from deltatune.core.method import Leaves, register
from deltatune.core.mixer import Mixer
from deltatune.core.site import Site
from deltatune.primitives.experts import shares

if TYPE_CHECKING:
    from deltatune.core.text import Text


@register("route")
@dataclass(frozen=True, kw_only=True)
class Route(Mixer):
    """Weights that share one among the members, from what the site reads.

    Attributes:
        chosen: how many members a token takes, whose softmax it then is; 0 for all that a site has.
    """

    chosen: int = 0

    category: ClassVar = "addition"
    review_category: ClassVar = "hybrid"
    count: ClassVar[str] = "n i"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        if self.chosen < 0 or (self.members and self.chosen > self.members):
            raise ConfigurationError(
                f"route: chosen lies in 0 to {self.members}, the members; it is {self.chosen}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {"R": normal(site.members, site.inputs, std=0.02)}

    def idle(self, site: Site, leaf: str) -> bool:
        return 1 in (site.members, self.chosen)  # the one member has the weight 1

    def mix(self, x: Tensor, z: Tensor | None, text: Text | None, p: Leaves) -> Tensor:
        return shares(linear(x, p["R"]), self.chosen)
