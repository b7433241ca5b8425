"""Prompt tuning: [P; E(x)], virtual tokens in front of the embedded text.

Lester et al. 2021, arXiv:2104.08691. P starts as the embeddings of tokens drawn from the
vocabulary; drawn from U(-0.5, 0.5) with `start='uniform'`. In an encoder-decoder it goes to the
encoder. It has no identity: the text attends to it from the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, uniform
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.virtual_tokens import vocabulary


@register("prompt")
@dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """Trained tokens in front of the text.

    Attributes:
        length: how many.
        start: vocabulary or uniform.
    """

    length: int = 20
    start: str = "vocabulary"

    aliases: ClassVar[tuple[str, ...]] = ("prompt_tuning", "soft_prompt", "pt")
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "L d, once"
    default_at: ClassVar[str] = "embedding"
    learning_rate: ClassVar[float] = 3e-2
    identity: ClassVar[bool] = False

    def check(self) -> None:
        if self.length < 1 or self.start not in ("vocabulary", "uniform"):
            raise ConfigurationError(
                f"prompt: length must be at least 1 and start vocabulary or uniform; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        if self.start == "uniform":
            return {"P": uniform(self.length, site.inputs, bound=0.5)}
        return {"P": vocabulary(site, self.length)}

    def embed(self, p: Leaves) -> Tensor:
        return p["P"]
