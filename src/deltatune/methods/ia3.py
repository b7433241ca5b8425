"""(IA)³: k' = l_k ⊙ k, v' = l_v ⊙ v, and l_ff ⊙ what the last map of the feed-forward reads.

Liu et al. 2022, arXiv:2205.05638. In weights, l scales the rows of the maps to keys and values and
the columns of `ffn.down`. The gains start at one. Maps that are named by `at` have their output
scaled, the last ones of a feed-forward their input, unless `side` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, ones
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("ia3")
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Gains of keys, values and the inner activation.

    Attributes:
        side: what is scaled: input, output, or by the place.
    """

    side: str = "place"

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "d, at ffn.down i"
    default_at: ClassVar[str] = "attention.k | attention.v | ffn.down"
    learning_rate: ClassVar[float] = 3e-3

    def check(self) -> None:
        if self.side not in ("place", "input", "output"):
            raise ConfigurationError(
                f"ia3: side must be place, input or output; it is {self.side!r}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        reads = site.part == "down" if self.side == "place" else self.side == "input"
        return {"in": ones(site.inputs)} if reads else {"out": ones(site.outputs)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        if "in" in p:
            return W * p["in"], b
        return p["out"].unsqueeze(-1) * W, b if b is None else p["out"] * b
