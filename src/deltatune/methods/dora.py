"""DoRA: W' = m V / |V| with V = W + (alpha / rank) B A, |V| the norms of its rows.

Liu et al. 2024, arXiv:2402.09353. m starts at the norms of the rows of W, so that the start is the
identity; |V| is a constant in the backward pass, as the authors propose. It does not add up with
other differences: what stands before it is part of its W. Dropout is refused, since the weight is
folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, given
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.core.storage import wide
from deltatune.primitives.low_rank import LowRank


@register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LowRank, Method):
    """A low-rank difference of the direction of every row, and its length."""

    count: ClassVar[str] = "r (i + d) + d"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {**super().init(site), "m": given((site.outputs,), _Norms(site))}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        V = W + self.product(p)
        return (p["m"] / _norms(V).detach()).unsqueeze(-1) * V, b


@dataclass(frozen=True)
class _Norms:
    site: Site

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        W = self.site.weight()
        return torch.ones(shape) if W.is_meta else _norms(wide(W.detach()).cpu())


def _norms(W: Tensor) -> Tensor:
    # In one layout, so that a sum of the same numbers is the same: GPT-2 stores W transposed.
    norms: Tensor = torch.linalg.vector_norm(W.contiguous(), dim=1)
    return norms
