"""RED: y' = w ⊙ y + e behind every feed-forward.

Wu et al. 2024, arXiv:2402.15179. Representation editing. w starts at one, e at zero: a Hadamard
adapter at another site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Method, register
from deltatune.primitives.gains import Gains


@register("red")
@dataclass(frozen=True, kw_only=True)
class RED(Gains, Method):
    """A gain and a shift of every feature that a feed-forward gives."""

    aliases: ClassVar[tuple[str, ...]] = ("representation_editing",)
    default_at: ClassVar[str] = "ffn.down"
