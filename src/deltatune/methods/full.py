"""Full fine-tuning: every parameter of the backbone, trained in place.

Devlin et al. 2019, arXiv:1810.04805. The control of every comparison, not a delta: it stands alone
on a model. A copy of the backbone as it was is kept, so that detaching restores every byte; count
that copy in when memory matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form
from deltatune.core.site import Site


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All parameters."""

    aliases: ClassVar[tuple[str, ...]] = ("fine_tuning", "full_fine_tuning")
    category: ClassVar[Category] = "control"
    review_category: ClassVar[ReviewCategory] = "control"
    count: ClassVar[str] = "everything"
    default_at: ClassVar[str] = "all"
    learning_rate: ClassVar[float] = 1e-4
    in_place: ClassVar[bool] = True

    def check(self) -> None:
        if self.at is not None:
            raise ConfigurationError(
                f"full trains everything, so it takes no target; found at={self.at!r}. "
                "Use last_layer(at=...) to train some modules whole."
            )

    def select(self, site: Site) -> Mapping[str, Form]:
        return {}
