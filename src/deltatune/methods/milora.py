"""MiLoRA: W' = W + (alpha / rank) (B A - B0 A0), A0 and B0 the smallest singular triplets of W.

Wang et al. 2024, arXiv:2406.09044. As `pissa`, from the other end of the spectrum: what W does most
is left alone. Where the rank of W is so low that these singular values are zero, so are A and B,
and nothing trains.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.spectral import Spectral, balanced


@register("milora")
@dataclass(frozen=True, kw_only=True)
class MiLoRA(Spectral, Method):
    """A low-rank difference that begins in the minor directions."""

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return balanced(W, slice(-self.rank, None), self.scale)
