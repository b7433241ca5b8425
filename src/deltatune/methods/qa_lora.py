"""QA-LoRA: W' = W + (alpha / rank) B A P, P the sums of every `group` features of the input.

Xu et al. 2023, arXiv:2309.14717. The difference is one number for a row and a group. On a base with
a zero point for each of these it could be written into the zero points: Z' = Z - s B A / S, without
rounding. No format that is kept here has zero points: on a quantised base it stays attached, on
plain numbers it is merged as every other. A starts as wide as LoRA's over all inputs, so that A P x
varies as A x does there; B at zero. PEFT multiplies the means of the groups by their number, not by
their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import TargetError
from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.blocks import pieces
from deltatune.primitives.low_rank import LowRank


@register("qa_lora")
@dataclass(frozen=True, kw_only=True)
class QALoRA(LowRank, Method):
    """A low-rank difference that is constant within groups of inputs.

    Attributes:
        group: features in one; as many as share a scale and a zero point.
    """

    group: int = 32

    count: ClassVar[str] = "r (i / b + d)"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        groups = pieces(site.inputs, self.group, self.name, site)
        leaves = super().init(site)
        if self.rank > groups:
            raise TargetError(
                f"qa_lora: {site.path} reads {groups} groups of {self.group} features, and "
                f"rank={self.rank} adds nothing to {groups}. Choose a smaller rank or group."
            )
        return {**leaves, "A": replace(leaves["A"], shape=(self.rank, groups))}

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"].repeat_interleave(self.group, dim=-1), self.scale * p["B"]
