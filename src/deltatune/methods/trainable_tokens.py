"""Trainable tokens: E'[t] = E[t] + d_t for chosen rows t of the table of embeddings, d zero at the
start.

Hugging Face 2025, PEFT. For tokens that were added to a vocabulary; there is no paper. PEFT keeps
the rows themselves, here they are differences to the backbone's: the same function. A table that is
tied to the head stays tied: the head reads the changed rows too. An untied head is left alone
unless it is named, at='embedding | head'. Tables of positions and of segments are left alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.method import Category, Method, ReviewCategory, register
from deltatune.core.select import Form, Rows
from deltatune.core.site import Site

_TERM = re.compile(r"(\d{1,18})(?::(\d{1,18}))?", re.ASCII)


@register("trainable_tokens")
@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Single rows of the embeddings.

    Attributes:
        tokens: their ids and ranges of ids, ends excluded: '5, 17, 100:110'.
    """

    tokens: str = ""

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    default_at: ClassVar[str] = "embedding"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "n d, n the tokens"

    def check(self) -> None:
        ranges = sorted(self.ranges(), key=lambda ids: ids.start)
        if not all(ranges) or any(a.stop > b.start for a, b in itertools.pairwise(ranges)):
            raise ConfigurationError(
                f"trainable_tokens: tokens={self.tokens!r} has an empty range or names a token "
                "twice. Name each once: '5, 17, 100:110'."
            )

    def ranges(self) -> list[range]:
        """The ids as ranges. Raises ConfigurationError."""
        terms = self.tokens.split(",") if self.tokens else []
        found = [_TERM.fullmatch(term.strip()) for term in terms]
        read = [range(int(m[1]), int(m[2] or int(m[1]) + 1)) for m in found if m is not None]
        if len(read) < len(found):
            raise ConfigurationError(
                "trainable_tokens: tokens must list ids and ranges of ids, as in '5, 17, 100:110'; "
                f"it is {self.tokens!r}."
            )
        return read

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        if not self.tokens:
            raise ConfigurationError(
                "trainable_tokens: no token is named. Say which: tokens='5, 17, 100:110'."
            )
        first = {(site.stack, site.part): site for site in reversed(sites)}
        return [site for site in sites if first[site.stack, site.part] is site]

    def select(self, site: Site) -> Mapping[str, Form]:
        held, ranges = (site.shape("weight") or (0,))[0], self.ranges()
        last = max(ids[-1] for ids in ranges)
        if last >= held:
            raise TargetError(
                f"trainable_tokens: {site.path} has {held} rows, and tokens={self.tokens!r} names "
                f"row {last}. Choose 0 to {held - 1}, or a target that is a table of embeddings."
            )
        return {"weight": Rows(tuple(itertools.chain(*ranges)))}
