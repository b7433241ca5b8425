"""Kernel-mix: W'_h = W_h + B_h A_h, a low-rank difference for every head h of an attention.

Chen et al. 2022, arXiv:2205.03720. W_h are the rows of W that make head h, at `attention.output`
the columns that read it. With `shared` an ordinary B A of that rank is added, which the heads share
(the authors' Kernel-mix; without it Kernel-mix-lite). As in their code nothing is scaled, but B
starts at zero, where they draw A and B from N(0, 1e-4), and there are no biases and no tanh. Their
difference of values reads keys, which a weight of its own cannot; here it reads what W reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, uniform, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.kronecker import divisors


@register("kernel_mix")
@dataclass(frozen=True, kw_only=True)
class KernelMix(Method):
    """A low-rank difference for each head, and one for all of them.

    Attributes:
        heads: of the attention; divides the width of its side of W.
        rank: r, of a head's difference.
        shared: of the difference that all heads share; 0 for none.
    """

    heads: int = 12
    rank: int = 8
    shared: int = 0

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "h r i + r d, at `attention.output` r i + h r d, h the heads"

    def check(self) -> None:
        if self.heads < 1 or self.rank < 1 or self.shared < 0:
            raise ConfigurationError(
                f"kernel_mix: heads and rank from 1 on, shared from 0 on; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        h, r, i, d = self.heads, self.rank, site.inputs, site.outputs
        reads = site.part == "output"
        whole, other = (i, d) if reads else (d, i)
        if whole % h or r > min(whole // h, other):
            raise TargetError(
                f"kernel_mix: heads={h} of rank={r} do not fit a width of {whole} at {site.path}. "
                f"Choose the heads of the attention, one of {', '.join(map(str, divisors(whole)))},"
                " and at most the features of one as the rank."
            )
        leaves = {
            "A": uniform(r, i, bound=(h / i) ** 0.5) if reads else uniform(h * r, i, bound=i**-0.5),
            "B": zeros(d, h * r if reads else r),
        }
        if self.shared:
            leaves["shared_A"] = uniform(self.shared, i, bound=i**-0.5)
            leaves["shared_B"] = zeros(d, self.shared)
        return leaves

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        A, B = p["A"], p["B"]
        if A.shape[-2] == self.rank:
            A = self._apart(A.mT).mT
        else:
            B = self._apart(B)
        if not self.shared:
            return A, B
        return torch.cat([A, p["shared_A"]], dim=-2), torch.cat([B, p["shared_B"]], dim=-1)

    def _apart(self, stacked: Tensor) -> Tensor:
        """What heads have above each other, [..., features, rank], on a diagonal of blocks."""
        own = torch.eye(self.heads, dtype=stacked.dtype, device=stacked.device)[:, None, :, None]
        cells = torch.unflatten(stacked, -2, (self.heads, -1)).unsqueeze(-2)
        return (cells * own).flatten(-2).flatten(-3, -2)
