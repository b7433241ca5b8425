"""NoReFT: h' = h + Rᵀ (W h + b - R h) at the first and the last tokens of the prompt, R free.

Wu et al. 2024, arXiv:2404.03592. LoReFT without orthonormal rows. R, W and b start as linear
layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.intervention import Intervention


@register("noreft")
@dataclass(frozen=True, kw_only=True)
class NoReFT(Intervention, Method):
    """An edit of the residual stream along directions that are free."""

    def edit(self, y: Tensor, p: Leaves) -> Tensor:
        return (linear(y, p["W"], p["b"]) - linear(y, p["R"])) @ p["R"]
