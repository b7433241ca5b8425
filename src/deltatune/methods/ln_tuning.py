"""LN-tuning: every parameter of every norm, gains and shifts, as values.

Zhao et al. 2023, arXiv:2312.11420. A norm without a shift (RMSNorm) trains its gain alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form, Values
from deltatune.core.site import Site


@register("ln_tuning")
@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """The norms."""

    aliases: ClassVar[tuple[str, ...]] = ("norm_tuning",)
    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the norm"
    default_at: ClassVar[str] = "norm"
    learning_rate: ClassVar[float] = 1e-3

    def select(self, site: Site) -> Mapping[str, Form]:
        return {name: Values() for name, value in site.parameters.items() if value is not None}
