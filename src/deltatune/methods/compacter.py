"""Compacter: a bottleneck with D = Σ_k A_k ⊗ (s_k t_k), U likewise, the A shared by all sites.

Mahabadi et al. 2021, arXiv:2106.04647. The n rules A (n, n, n) are one tensor for both maps of all
sites; s and t are of rank r. Rules start from N(0, 0.0001), s and t as Glorot does: near the
identity, not at it. The authors train the norms, too: add `ln_tuning`.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.core.method import Method, register
from deltatune.primitives.hypercomplex import SharedRule


@register("compacter")
@dataclass(frozen=True, kw_only=True)
class Compacter(SharedRule, Method):
    """A hypercomplex bottleneck of low rank behind every sublayer."""
