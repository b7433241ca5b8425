"""RandLoRA: W' = W + (alpha / rank) Σ_n B_n diag(u_n) A diag(v_n), A and B random and frozen.

Albert et al. 2025, arXiv:2502.00987. As many terms as make the difference of full rank, the smaller
width over r, rounded up. Where the output is the narrower side, all is transposed, so that v is
as short as it can be. u starts at zero, v at one over the longer of its sides. A and B, of variance
one, are shared by all sites of equal widths, where PEFT cuts those of all sites out of the largest;
they are stored, and B is as large as W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, constant, uniform, zeros
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("randlora")
@dataclass(frozen=True, kw_only=True)
class RandLoRA(LowRank, Method):
    """A sum of random products of low rank, each with trained diagonals.

    Attributes:
        rank: r, of every term; a smaller one has more terms and trains more.
    """

    rank: int = 32
    alpha: float = 640.0

    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "n (r + min(i, d)), n = min(i, d) / r"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        super().init(site)  # refuses a rank above the widths
        small = min(site.inputs, site.outputs)
        terms = -(-small // self.rank)
        lower, upper = self.rank, terms * self.rank
        if site.inputs > site.outputs:
            lower, upper = upper, lower
        return {
            "A": _basis(lower, site.inputs),
            "B": _basis(site.outputs, upper),
            "u": zeros(terms, self.rank),
            "v": constant(terms, small, value=1 / max(terms, small)),
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        A, B, v = p["A"], p["B"], p["v"].unsqueeze(-2)
        on_input = v.shape[-1] == A.shape[-1]
        small = A if on_input else B.mT
        terms = (p["u"].unsqueeze(-1) * small.unsqueeze(-3) * v).flatten(-3, -2)
        return (terms, self.scale * B) if on_input else (A, self.scale * terms.mT)


def _basis(rows: int, columns: int) -> Leaf:
    """Uniform of variance one, shared by all sites at which it has this shape."""
    return replace(uniform(rows, columns, bound=3**0.5).tied(f"{rows}x{columns}"), trained=False)
