"""Interventions on the residual stream at the first and the last tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Fill, Leaf, given, uniform
from deltatune.core.method import Category, ReviewCategory
from deltatune.core.site import Site
from deltatune.core.text import Text

__all__ = ["Intervention"]


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What ReFT's kin have in common; a method gives `edit`, what it adds.

    A prompt of n tokens is edited at min(first, n // 2) and min(last, n // 2) of them, so that the
    two never meet; with `whole` at min(first, n) and min(last, n), and where they meet the edit of
    the last ones holds. Tokens that are generated, or that `labels` asks for, are left as they are.

    Attributes:
        rank: r, the dimensions that are edited.
        first, last: how many tokens at either end of the prompt.
        separate: whether either end has an edit of its own.
        whole: whether an end may reach beyond the middle of a short prompt, as AdapterHub's does.
    """

    rank: int = 8
    first: int = 3
    last: int = 3
    separate: bool = False
    whole: bool = False

    name: ClassVar[str]
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "residual"
    learning_rate: ClassVar[float] = 1e-3
    identity: ClassVar[bool] = False
    count: ClassVar[str] = "2rd + r"

    def check(self) -> None:
        """Raises ConfigurationError for a rank below 1, or no token to edit."""
        if self.rank < 1:
            raise ConfigurationError(f"{self.name}: rank must be at least 1; it is {self.rank}.")
        if min(self.first, self.last) < 0 or self.first + self.last < 1:
            raise ConfigurationError(
                f"{self.name}: first and last are 0 or more, and one of them at least 1; found "
                f"first={self.first}, last={self.last}."
            )

    @property
    def ends(self) -> int:
        """How many edits there are: 2 where either end has its own."""
        return 2 if self.separate and self.first and self.last else 1

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        """In an encoder-decoder the prompt is the encoder's text."""
        return [site for site in sites if site.stack == "encoder"] or sites

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """R, W and b, drawn as linear layers are; see `leaves`."""
        return self.leaves(site)

    def leaves(self, site: Site, start: Fill | None = None) -> dict[str, Leaf]:
        """R and W [ends, r, d] and b [ends, r], drawn as linear layers are, R by `start` if given.

        Raises TargetError for a rank above the width.
        """
        r, d = self.rank, site.outputs
        if r > d:
            raise TargetError(
                f"{self.name}: a rank of {r} is more than the width of {d} at {site.path}. "
                f"Choose 1 to {d}."
            )
        drawn = uniform(self.ends, r, d, bound=d**-0.5)
        return {
            "R": drawn if start is None else given((self.ends, r, d), start),
            "W": drawn,
            "b": uniform(self.ends, r, bound=d**-0.5),
        }

    def read(self, x: Tensor, y: Tensor, text: Text, p: Mapping[str, Tensor]) -> Tensor:
        """See Method."""
        return self.edited(y, text.prompt, p)

    def edited(self, y: Tensor, prompt: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """New y [..., tokens, d]: where the prompt [..., tokens] says, with `edit` added."""
        order, count = prompt.cumsum(-1) - 1, prompt.sum(-1, keepdim=True)
        most = count if self.whole else count // 2
        last = prompt & (order >= count - most.clamp(max=self.last))
        first = prompt & (order < most.clamp(max=self.first)) & ~last
        for end, places in enumerate((first, last) if self.ends == 2 else (first | last,)):
            own = {name: leaf[end] for name, leaf in p.items()}
            y = torch.where(places.unsqueeze(-1), y + self.edit(y, own), y)
        return y

    def edit(self, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """What is added to y [..., d], from the leaves of one end."""
        raise NotImplementedError
