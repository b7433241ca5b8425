"""PiSSA: W' = W + (alpha / rank) (B A - B0 A0), A0 and B0 the largest singular triplets of W.

Meng et al. 2024, arXiv:2404.02948. (alpha / rank) B0 A0 is the best approximation of W of rank r.
The authors take it out of W, which stays as it is here: B0 and A0 are stored beside B and A. The
decomposition is exact and runs on the CPU, once for a site.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.spectral import Spectral, balanced


@register("pissa")
@dataclass(frozen=True, kw_only=True)
class PiSSA(Spectral, Method):
    """A low-rank difference that begins in the principal directions."""

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return balanced(W, slice(self.rank), self.scale)
