"""SNIP adapter: y' = y + (U ⊙ M_U) σ((D ⊙ M_D) y + c) + e, M the entries of the largest |w dL/dw|.

He et al. 2022, arXiv:2210.04284; the scores are those of Lee et al. 2019, arXiv:1810.02340. The
default of SparseAdapter, beside `sparse_adapter`, whose masks are random. Gradients are of the mean
loss over the first `rows` rows of the training data; of D and U of all sites together the share
1 - sparsity is kept, and all else is zero, stays zero and is not stored. Biases have no mask. With
U at zero every score would be zero: it starts at N(0, `up_std`²), so that the function is changed
from the start. Before training nothing is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.policy import Found, Kind
from deltatune.primitives.bottleneck import Bottleneck
from deltatune.primitives.from_data import FromData
from deltatune.primitives.pruning import masks


@register("snip_adapter")
@dataclass(frozen=True, kw_only=True)
class SNIPAdapter(FromData, Bottleneck, Method):
    """A bottleneck whose weights are chosen before training, by what each of them matters.

    Attributes:
        sparsity: the share of the entries of D and U of all sites that is off, in [0, 1).
        rows: see FromData.
    """

    activation: str = "gelu"
    up_std: float = 0.02
    sparsity: float = 0.8
    rows: int = 64

    surveys: ClassVar[Kind] = "leaves"
    aliases: ClassVar[tuple[str, ...]] = ("sparse_adapter_snip",)
    review_category: ClassVar[ReviewCategory] = "unified"
    count: ClassVar[str] = "2dm, a share kept; m + d"
    identity: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if not 0 <= self.sparsity < 1 or not self.up_std:
            raise ConfigurationError(
                "snip_adapter: sparsity lies in [0, 1) and up_std is above 0, else all scores are "
                f"zero; found sparsity={self.sparsity}, up_std={self.up_std}."
            )

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        # What is zero gets no gradient: it was taken out.
        return y + self.apply(y, {**p, **{name: p[name] * (p[name] != 0) for name in ("D", "U")}})

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:
        del memory
        held = [(found.values[name], found.seen[name]) for found in sites for name in ("D", "U")]
        chosen = masks([(value * gradient).abs() for value, gradient in held], 1 - self.sparsity)
        for (value, _), mask in zip(held, chosen, strict=True):
            value.mul_(mask)
