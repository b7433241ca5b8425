"""What prompts have in common: tokens drawn from the vocabulary, tokens that something makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, given
from deltatune.core.method import METHODS, Category, Method, ReviewCategory
from deltatune.core.site import Site

__all__ = ["MadeTokens", "vocabulary"]


def vocabulary(site: Site, length: int) -> Leaf:
    """A leaf [length, width] that starts as the embeddings of tokens drawn at random."""
    return given((length, site.inputs), _FromVocabulary(site))


@dataclass(frozen=True)
class _FromVocabulary:
    site: Site

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        assert self.site.entry is not None
        table = self.site.table()
        drawn = torch.randint(table.shape[0], shape[:-1], generator=random).to(table.device)
        if table.is_meta:
            return torch.zeros(shape)
        # BART's and Gemma's embeddings give their rows scaled, and so the text beside the prompt.
        scale = float(getattr(self.site.entry[1], "embed_scale", 1.0))
        return table.detach()[drawn].float() * scale


@dataclass(frozen=True, kw_only=True)
class MadeTokens:
    """A prompt that is made of other leaves while training; a method says how, in `embed`.

    Its artefact is a `prompt`, which gives the same tokens.

    Attributes:
        length: L, how many tokens.
    """

    at: str | None = None
    length: int = 20

    name: ClassVar[str]
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "embedding"
    identity: ClassVar[bool] = False

    def check(self) -> None:
        """Raises ConfigurationError for a length below 1."""
        if self.length < 1:
            raise ConfigurationError(
                f"{self.name}: length must be at least 1; it is {self.length}."
            )

    def embed(self, p: Mapping[str, Tensor]) -> Tensor:
        """The tokens, [length, width]."""
        raise NotImplementedError

    def stored(self) -> Method:
        """The prompt that an artefact holds."""
        return METHODS["prompt"](at=self.at, length=self.length)  # type: ignore[call-arg]

    def collapse(self, site: Site, p: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Its leaf: the tokens as they are made now."""
        del site
        return {"P": self.embed(p)}
