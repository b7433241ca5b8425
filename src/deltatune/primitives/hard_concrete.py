"""Hard concrete gates z = clip(3 σ(a) - 1.5, 0, 1) on a difference, and their noise.

Louizos et al. 2018, arXiv:1712.01312, with the limits of diff pruning: a gate is open, z > 0, with
probability σ(a) when logistic noise is added to a.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, constant
from deltatune.core.select import Difference
from deltatune.core.site import Site

__all__ = ["GATE", "Gated", "noisy", "opened"]

GATE = ".gate"  #: what the leaf of a gate is called, behind the parameter's name


class Gated(Difference):
    """W' = W + z w, with w zero and a = 5 at the start."""

    additive = False

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        """See Form."""
        (w,) = super().leaves(site, parameter).values()
        return {parameter: w, parameter + GATE: constant(*w.shape, value=5.0)}

    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        """See Form."""
        return incoming + opened(p[name + GATE]) * p[name]


def opened(a: Tensor) -> Tensor:
    """z of the gates a."""
    return (3.0 * torch.sigmoid(a) - 1.5).clamp(0.0, 1.0)


def noisy(a: Tensor, random: torch.Generator) -> Tensor:
    """The gates with logistic noise."""
    return a + torch.logit(torch.rand(a.shape, generator=random), eps=1e-6).to(a)
