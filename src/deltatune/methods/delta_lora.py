"""Delta-LoRA: W' = W + s B A + ratio s (B A - B0 A0), s = alpha / rank, the last term constant.

Zi et al. 2023, arXiv:2309.02411. From a share `begin` of training on, the authors move W itself by
the change of B A in every step. These changes add up to B A - B0 A0, with the factors B0 A0 of that
moment: W stays as it is here, and one delta holds all. Without dropout, as theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.policy import Held, Moment
from deltatune.core.site import Site
from deltatune.primitives.low_rank import LowRank


@register("delta_lora")
@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LowRank, Method):
    """A low-rank difference, and the way it has gone added to the weight.

    Attributes:
        ratio: by which that way is multiplied.
        begin: the share of training before it is counted.
    """

    ratio: float = 2.0
    begin: float = 0.1

    def check(self) -> None:
        super().check()
        if self.dropout or not 0 <= self.begin < 1:
            raise ConfigurationError(
                "delta_lora takes no dropout, as its authors, and begin lies in [0, 1); found "
                f"dropout={self.dropout}, begin={self.begin}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        leaves = super().init(site)
        fixed = {f"{n}0": replace(zeros(*leaf.shape), trained=False) for n, leaf in leaves.items()}
        return {**leaves, **fixed, "begun": replace(zeros(1), trained=False)}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        way = self.ratio * p["begun"].unsqueeze(-1)
        gone = way * p["B"].detach(), -way * p["B0"]
        A = torch.cat([p["A"], p["A"].detach(), p["A0"]], dim=-2)
        return A, self.scale * torch.cat([p["B"], *gone], dim=-1)

    def on_step(self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment) -> None:
        for held in sites:
            if moment.done >= self.begin and not held.values["begun"].item():
                held.values["begun"].fill_(1.0)
                for name in ("A", "B"):
                    held.values[f"{name}0"].copy_(held.values[name])
