"""FourierFT: W' = W + scale Re(IDFT2(E)), E zero but for n trained entries at random places.

Gao et al. 2024, arXiv:2405.03003. The places are those of the first site of each shape, drawn once
and stored. The coefficients start at zero; the authors draw them from N(0, 1) (`std=1.0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, normal, places
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("fourierft")
@dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    """A difference of few frequencies.

    Attributes:
        frequencies: n, the trained coefficients of a site.
        scale: by which the transform is multiplied.
        std: of the coefficients at the start.
    """

    frequencies: int = 1000
    scale: float = 150.0
    std: float = 0.0

    aliases: ClassVar[tuple[str, ...]] = ("fourier_ft",)
    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    count: ClassVar[str] = "n"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-2

    def check(self) -> None:
        if self.frequencies < 1 or self.std < 0:
            raise ConfigurationError(
                f"fourierft: frequencies from 1 and std from 0 on; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        entries = site.outputs * site.inputs
        if self.frequencies > entries:
            raise TargetError(f"fourierft: {site.path} has {entries} frequencies; found {self}.")
        tie = f"{site.outputs}x{site.inputs}"
        drawn = places(self.frequencies, entries).tied(tie)
        return {"c": normal(self.frequencies, std=self.std), "places": drawn}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        E = W.new_zeros(W.numel()).index_copy(0, p["places"], p["c"].to(W.dtype))
        return W + self.scale * torch.fft.ifft2(E.view_as(W)).real, b
