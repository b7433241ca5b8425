"""DyLoRA: W' = W + (alpha / b) B[:, :b] A[:b], b drawn from {lowest, ..., rank} in every step.

Valipour et al. 2022, arXiv:2210.07558. All sites share the draw of a step, as in the authors' code.
What is trained serves at every rank of that range: `used` names the one of evaluation and of
validation while training, with all ranks stored. With `frozen` a step trains the last row and
column of its draw alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Leaves, Method, register
from deltatune.core.policy import Draws
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("dylora")
@dataclass(frozen=True, kw_only=True)
class DyLoRA(LowRank, Method):
    """A low-rank difference whose first ranks stand for themselves.

    Attributes:
        lowest: the smallest rank that is drawn.
        used: the rank in evaluation; 0 for all.
        frozen: whether a step trains one rank alone.
    """

    lowest: int = 1
    used: int = 0
    frozen: bool = False

    def check(self) -> None:
        super().check()
        if not 1 <= self.lowest <= self.rank or not 0 <= self.used <= self.rank:
            raise ConfigurationError(
                f"dylora: lowest lies in 1 to rank={self.rank} and used in 0 to {self.rank}; found "
                f"lowest={self.lowest}, used={self.used}."
            )

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        b = int(torch.randint(self.lowest, self.rank + 1, (), generator=draws.of()))
        A, B = p["A"], p["B"]
        if self.frozen:
            last = (torch.arange(self.rank, device=A.device) == b - 1).to(A.dtype)
            A = A.detach() + last.unsqueeze(-1) * (A - A.detach())
            B = B.detach() + last * (B - B.detach())
        return {"A": A, "B": B, "share": self._share(b, A)}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        share = p["share"] if "share" in p else self._share(self.used or self.rank, p["A"])
        return share.unsqueeze(-1) * p["A"], p["B"]

    def _share(self, b: int, A: Tensor) -> Tensor:
        """alpha / b for the first b ranks, 0 for the others."""
        return (torch.arange(self.rank, device=A.device) < b).to(A.dtype) * (self.alpha / b)
