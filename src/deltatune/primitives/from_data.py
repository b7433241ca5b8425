"""Starts that come from the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.policy import Kind, Wanted

__all__ = ["FromData"]


@dataclass(frozen=True, kw_only=True)
class FromData:
    """What methods have in common that look at rows of the training data before the first step.

    Attributes:
        rows: how many.
    """

    rows: int = 128

    surveys: ClassVar[Kind]

    @property
    def wanted(self) -> Wanted:
        """What it looks at."""
        return Wanted(self.surveys, self.rows)
