"""Difference tuning: W' = W + d for whole parameters, d starting at zero.

Guo et al. 2020, arXiv:2012.07463. Diff pruning without its mask and its penalty: every entry may
differ. It is what arithmetic on deltas leaves where no product of low rank is smaller; BitFit is
`difference(parameters='bias', at='linear | norm')`. A bias that is missing is created as zero. A
parameter tied between modules is one leaf and acts at those of them that the target names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site


@register("difference")
@dataclass(frozen=True, kw_only=True)
class DenseDifference(Method):
    """A trained difference of every entry.

    Attributes:
        parameters: the names of the parameters, `|` between them.
    """

    parameters: str = "weight"

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    default_at: ClassVar[str] = "block.linear"
    learning_rate: ClassVar[float] = 3e-4
    count: ClassVar[str] = "all of the named parameters"

    def check(self) -> None:
        if not all(self.names):
            raise ConfigurationError(
                "difference: parameters are names with '|' between them, such as "
                f"'weight | bias'; found {self.parameters!r}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, one by one."""
        return tuple(name.strip() for name in self.parameters.split("|"))

    def select(self, site: Site) -> Mapping[str, Form]:
        held = {name for name, value in site.parameters.items() if value is not None}
        there = held | {"bias"} if "weight" in held else held
        return {name: Difference() for name in self.names if name in there}
