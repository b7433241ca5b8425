"""OLoRA: W' = W + (alpha / rank) (B A - B0 A0), A0 and B0 from W = Q R.

Büyükakyüz 2024, arXiv:2406.01775. B0 is the first r columns of Q, orthonormal, and A0 the first r
rows of R. W stays as it is, see `pissa`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.method import Method, register
from deltatune.primitives.spectral import Spectral


@register("olora")
@dataclass(frozen=True, kw_only=True)
class OLoRA(Spectral, Method):
    """A low-rank difference that begins with an orthonormal basis."""

    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(W)
        return R[: self.rank], Q[:, : self.rank]
