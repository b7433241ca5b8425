"""LoReFT: h' = h + Rᵀ (W h + b - R h) at the first and the last tokens of the prompt, R Rᵀ = I.

Wu et al. 2024, arXiv:2404.03592. The rows of R are made orthonormal by a QR decomposition whose
triangle has a positive diagonal, so that an orthonormal leaf stands for itself; the authors' code
uses torch's product of reflections. R starts orthonormal, W and b as a linear layer: no identity.
pyreft counts the last tokens from before the prompt's last one; here it is one of them. What is
generated is not edited, which takes a cache: without one, only `labels` tell where a prompt ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.intervention import Intervention


@register("reft")
@dataclass(frozen=True, kw_only=True)
class ReFT(Intervention, Method):
    """An edit of the residual stream within a subspace."""

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return self.leaves(site, _drawn)

    def edit(self, y: Tensor, p: Leaves) -> Tensor:
        R = _orthonormal(p["R"])
        return (linear(y, p["W"], p["b"]) - linear(y, R)) @ R


def _orthonormal(rows: Tensor) -> Tensor:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    Q, triangle = torch.linalg.qr(wide.mT)
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    made: Tensor = (Q * signs.unsqueeze(-2)).mT.to(rows.dtype)
    return made


def _drawn(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return _orthonormal(torch.randn(shape, generator=random))
