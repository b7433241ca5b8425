"""MPT: [P ⊙ u vᵀ; E(x)], a prompt that tasks share, and a rank-one gain of it for each task.

Wang et al. 2023, arXiv:2303.02861. A bank with `sharing="method"` has one P and u, v in each slot.
The authors also distil from prompts of one task each, which is not here. u and v start at one,
where the authors take the means over the source tasks, and P as the embeddings of tokens drawn from
the vocabulary, unless it starts from another `mpt` (`core.start`). `frozen` trains u and v alone,
which is what a further task costs. Only the tokens are stored, as a `prompt`. No identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf, ones
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.virtual_tokens import MadeTokens, vocabulary


@register("mpt")
@dataclass(frozen=True, kw_only=True)
class MPT(MadeTokens, Method):
    """A prompt times an outer product.

    Attributes:
        frozen: whether P stays as it starts.
    """

    frozen: bool = False

    learning_rate: ClassVar[float] = 3e-2
    count: ClassVar[str] = "L d + L + d, once; frozen L + d"
    shared_leaves: ClassVar[tuple[str, ...]] = ("P",)
    training_fields: ClassVar[tuple[str, ...]] = ("frozen",)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {
            "P": replace(vocabulary(site, self.length), trained=not self.frozen),
            "u": ones(self.length),
            "v": ones(site.inputs),
        }

    def embed(self, p: Leaves) -> Tensor:
        return p["P"] * p["u"].unsqueeze(-1) * p["v"]
