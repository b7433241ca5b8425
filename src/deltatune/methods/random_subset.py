"""Random-subset tuning: W' = W + v at a share of all single entries, drawn at random, v zero at the
start.

Ben-Zaken et al. 2021, arXiv:2106.10199. Also in Ding et al. 2023, as a control of chosen subsets.
The budget is one for all parameters, rounded down: every set of so many entries is equally likely.
The set depends on the seed and on the names and shapes of the parameters, not on their order. The
entries are stored with their places. A parameter that is tied counts once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import generator
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form, Sparse
from deltatune.core.site import Site, sizes


@register("random_subset")
@dataclass(frozen=True, kw_only=True)
class RandomSubset(Method):
    """Single entries of all parameters.

    Attributes:
        share: of the parameters that are tuned, in (0, 1].
        seed: of the draw.
    """

    share: float = 0.005
    seed: int = 0

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    default_at: ClassVar[str] = "*"
    learning_rate: ClassVar[float] = 3e-3
    count: ClassVar[str] = "share of all"

    def check(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigurationError(
                f"random_subset: share must lie in (0, 1]; it is {self.share}."
            )

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        found = sizes(sites)
        total = sum(found.values())
        count = int(Fraction(str(self.share)) * total)  # 0.29 of 100 are 29
        if not count:
            raise TargetError(
                f"random_subset: share={self.share} of {total} entries is none. Choose "
                f"{1 / max(total, 1):.2g} or more, or a larger target."
            )
        counts = _split(count, tuple(found.values()), self.seed)
        drawn = dict(zip(found, counts, strict=True))
        return [
            replace(site, allotted={n: drawn.get((site.name, n), 0) for n in site.parameters})
            for site in sites
        ]

    def select(self, site: Site) -> Mapping[str, Form]:
        return {
            name: Sparse(count, _Places(self.seed, f"{site.name}.{name}", site.entries(name)))
            for name, count in site.allotted.items()
            if count
        }


@dataclass(frozen=True)
class _Places:
    seed: int
    name: str
    entries: int

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random  # every slot has the same set
        own = generator("random_subset", self.seed, self.name)
        return torch.randperm(self.entries, generator=own)[: shape[0]]


@functools.lru_cache(maxsize=32)  # of billions of entries it takes seconds
def _split(count: int, sizes: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """How many of `count` different entries, drawn from all, fall to each of some tensors."""
    ends = torch.tensor(sizes).cumsum(0)
    total = int(ends[-1])
    if 2 * count > total:  # few are left out: draw those
        left = _split(total - count, sizes, seed)
        return tuple(size - out for size, out in zip(sizes, left, strict=True))
    random = generator("random_subset", seed)
    drawn, missing, below = list[Tensor](), count, torch.zeros_like(ends)
    while missing:
        new = torch.unique(torch.randint(total, (missing,), generator=random))
        for held in drawn:
            place = torch.searchsorted(held, new).clamp(max=len(held) - 1)
            new = new[held[place] != new]
        if len(new):
            drawn.append(new)
            missing -= len(new)
            below += torch.searchsorted(new, ends)
    return tuple(below.diff(prepend=below.new_zeros(1)).tolist())
