"""WaveFT: W' = W + scale IDWT2(E), E zero but for n trained entries at random places.

Bilican et al. 2025, arXiv:2505.12532. One level of the Haar wavelet, the default of PEFT, so that
an entry changes four neighbours of W. An odd width is padded by one. The places are those of the
first site of each shape, drawn once and stored; the coefficients start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, places, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("waveft")
@dataclass(frozen=True, kw_only=True)
class WaveFT(Method):
    """A difference of few wavelets.

    Attributes:
        coefficients: n, the trained ones of a site.
        scale: by which the transform is multiplied.
    """

    coefficients: int = 2592
    scale: float = 25.0

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-2
    count: ClassVar[str] = "n"

    def check(self) -> None:
        if self.coefficients < 1:
            raise ConfigurationError(
                f"waveft: coefficients must be at least 1; found {self.coefficients}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        entries = site.outputs * site.inputs
        if self.coefficients > entries:
            raise TargetError(f"waveft: {site.path} has {entries} coefficients; found {self}.")
        drawn = places(self.coefficients, entries).tied(f"{site.outputs}x{site.inputs}")
        return {"c": zeros(self.coefficients), "places": drawn}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        E = W.new_zeros(W.numel()).index_copy(0, p["places"], p["c"].to(W.dtype)).view_as(W)
        whole = functional.pad(E, (0, W.shape[1] % 2, 0, W.shape[0] % 2))
        (low, rows), (columns, both) = (half.chunk(2, 1) for half in whole.chunk(2, 0))
        waves = _joined(_joined(low, rows, 0), _joined(columns, both, 0), 1)
        return W + self.scale * waves[: W.shape[0], : W.shape[1]], b


def _joined(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """Haar's inverse transform along one dimension: each pair of entries makes two neighbours."""
    pairs = torch.stack([low + high, low - high], dim + 1) / 2**0.5
    return pairs.flatten(dim, dim + 1)
