"""LoftQ: W' = Q(W) + (alpha / rank) B A, B A beginning as the best approximation of W - Q(W).

Li et al. 2023, arXiv:2310.08659. The base must have been quantised with `error_rank`, which keeps
the largest singular triplets of what is rounded off; with `error_rounds` above 1 it is Q(W - B A),
as the authors alternate. They take no account of alpha / rank, here B A is divided by it. On plain
numbers nothing is rounded off: it begins as LoRA, so that one expression serves all formats. Its
artefact is a `lora`, for a base of the same codes. Carried to plain numbers, that would add the
error to a weight which has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf
from deltatune.core.method import METHODS, Leaves, Method, register
from deltatune.core.quantised import Quantised
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.primitives.low_rank import LowRank


@register("loftq")
@dataclass(frozen=True, kw_only=True)
class LoftQ(LowRank, Method):
    """LoRA that begins with what quantising took from the weight.

    Attributes:
        alpha: with that of the authors, the rank, the product is scaled by one.
    """

    alpha: float = 8.0

    def init(self, site: Site) -> Mapping[str, Leaf]:
        storage, leaves = storage_of(site.module), super().init(site)
        if not isinstance(storage, Quantised):
            return leaves
        begin = _Error(site, self.rank, self.scale, storage.format(site.module))
        return {
            name: replace(leaf, fill=replace(begin, name=name)) for name, leaf in leaves.items()
        }

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        return p["A"], self.scale * p["B"]

    def stored(self) -> Method:
        return METHODS["lora"](**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class _Error:
    site: Site
    rank: int
    scale: float
    format: str
    name: str = ""

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        if self.site.value("weight").is_meta:
            return torch.zeros(shape)
        kept = self.site.error()
        if kept is None or len(kept[0]) < self.rank:
            found = "nothing" if kept is None else f"{len(kept[0])} triplets"
            raise ConfigurationError(
                f"loftq: {self.site.name} is kept as {self.format} with {found} of what was "
                f"rounded off, and rank={self.rank} needs as many. Quantise plain numbers with "
                f"error_rank={self.rank} (`quantise`, `load_backbone`, an option of `train`)."
            )
        begin = kept[0][: self.rank] if self.name == "A" else kept[1][:, : self.rank]
        return begin / math.sqrt(self.scale)
