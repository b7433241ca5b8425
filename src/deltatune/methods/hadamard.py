"""Hadamard adapter: y' = w ⊙ y + e behind the attention.

Chen et al. 2023, arXiv:2407.11033. w starts at one, e at zero. The authors train the norm that
follows, too: add `ln_tuning`. The gains of the feed-forward instead are `red`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Method, register
from deltatune.primitives.gains import Gains


@register("hadamard")
@dataclass(frozen=True, kw_only=True)
class Hadamard(Gains, Method):
    """A gain and a shift of every feature that an attention gives."""

    aliases: ClassVar[tuple[str, ...]] = ("hadamard_adapter",)
    default_at: ClassVar[str] = "attention.output"
