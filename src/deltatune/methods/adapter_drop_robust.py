"""AdapterDrop, robust: adapters behind all sublayers, in each step without those of n lower blocks.

Rücklé et al. 2021, arXiv:2010.11918. n is drawn from {0, ..., dropped} in every step, once for all
sites and for every stack; the paper draws up to all blocks but one. Evaluation uses all adapters.
What was trained serves at every such n, because the bottlenecks of the lower blocks may be set to
zero; that it then costs less, as `adapter_drop` does, takes a delta without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.method import Leaves, Method, register
from deltatune.core.policy import Draws
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("adapter_drop_robust")
@dataclass(frozen=True, kw_only=True)
class AdapterDropRobust(Bottleneck, Method):
    """A bottleneck behind every sublayer that does without the lower ones.

    Attributes:
        dropped: the largest n, blocks of each stack that are left out.
    """

    dropped: int = 5
    activation: str = "gelu"

    aliases: ClassVar[tuple[str, ...]] = ("robust_adapter_drop",)

    def check(self) -> None:
        super().check()
        if self.dropped < 0:
            raise ConfigurationError(f"{self.name}: dropped is 0 or more; found {self.dropped}.")

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        highest = max((site.block for site in sites if site.block is not None), default=0)
        if self.dropped > highest:
            raise TargetError(
                f"{self.name}: of {highest + 1} blocks at most {highest} can be left out; dropped "
                f"is {self.dropped}. Choose fewer."
            )
        return sites

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        left_out = int(torch.randint(self.dropped + 1, (), generator=draws.of()))
        on = float(site.block is None or site.block >= left_out)
        return {name: leaf * on if name in ("U", "e") else leaf for name, leaf in p.items()}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self.apply(y, p)
