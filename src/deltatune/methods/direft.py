"""DiReFT: h' = h + Rᵀ (W h + b) at the first and the last tokens of the prompt.

Wu et al. 2024, arXiv:2404.03592. LoReFT without the difference and without orthonormal rows, as the
paper has it; pyreft's class of that name keeps R orthonormal. R, W and b start as linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.method import Leaves, Method, register
from deltatune.primitives.intervention import Intervention


@register("direft")
@dataclass(frozen=True, kw_only=True)
class DiReFT(Intervention, Method):
    """LoRA on the residual stream, at some tokens."""

    def edit(self, y: Tensor, p: Leaves) -> Tensor:
        return linear(y, p["W"], p["b"]) @ p["R"]
