"""Last-layer tuning: W' = v for every parameter of the last block, v starting at W.

Lee et al. 2019, arXiv:1911.03090; Ding et al. 2023, Nature Machine Intelligence. In an
encoder-decoder the last encoder block, as in the second. The blocks below keep no activations.
Other blocks are named by `at`, for example `at='block[-3:]'`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form, Values
from deltatune.core.site import Site


@register("last_layer")
@dataclass(frozen=True, kw_only=True)
class LastLayer(Method):
    """All parameters of the last block."""

    aliases: ClassVar[tuple[str, ...]] = ("partial_fine_tuning",)
    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the module"
    default_at: ClassVar[str] = "block[-1]"
    learning_rate: ClassVar[float] = 3e-4

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        encoder = [site for site in sites if site.stack == "encoder"]
        return encoder if encoder and self.at is None else sites

    def select(self, site: Site) -> Mapping[str, Form]:
        return {name: Values() for name, value in site.parameters.items() if value is not None}
