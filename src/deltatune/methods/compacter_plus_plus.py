"""Compacter++: Compacter behind the feed-forward only.

Mahabadi et al. 2021, arXiv:2106.04647. All else is as in `compacter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Method, register
from deltatune.primitives.hypercomplex import SharedRule


@register("compacter_plus_plus")
@dataclass(frozen=True, kw_only=True)
class CompacterPlusPlus(SharedRule, Method):
    """A hypercomplex bottleneck of low rank behind every feed-forward."""

    default_at: ClassVar[str] = "ffn"
