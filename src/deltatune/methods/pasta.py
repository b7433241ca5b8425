"""PASTA: h' = h + e_i at the i-th special token of the text, in front of every block.

Yang et al. 2023, arXiv:2210.04382. Special are the ids that `tokens` names, [CLS] and [SEP] of
BERT's vocabularies unless said otherwise; they are counted in each row by itself. What comes after
the last vector is left as it is, where the authors' code refuses it. The vectors start at zero; the
authors draw them from N(0, 1) and drop them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.leaf import Leaf, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.core.text import Text


@register("pasta")
@dataclass(frozen=True, kw_only=True)
class PASTA(Method):
    """Trained vectors at special tokens.

    Attributes:
        length: L, how many special tokens of a text have a vector.
        tokens: the ids of special tokens, with spaces between.
    """

    length: int = 3
    tokens: str = "101 102"

    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "residual"
    learning_rate: ClassVar[float] = 3e-3
    at_input: ClassVar[bool] = True
    count: ClassVar[str] = "L d"

    def check(self) -> None:
        if self.length < 1 or not re.fullmatch(r"\d+( \d+)*", self.tokens):
            raise ConfigurationError(
                "pasta: length must be at least 1, and tokens are ids with spaces between, as "
                f"'101 102'; found {self}."
            )

    def init(self, site: Site) -> Mapping[str, Leaf]:
        return {"e": zeros(self.length, site.inputs)}

    def show(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        if text.ids is None:
            raise UnsupportedError(
                "pasta finds special tokens by their ids, and the model was called with "
                "inputs_embeds. Call it with input_ids."
            )
        special = torch.tensor([int(one) for one in self.tokens.split()], device=y.device)
        there = torch.isin(text.ids, special) & text.real[..., -text.tokens :]
        return there.to(y.dtype).unsqueeze(-1)

    def read(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        assert text.shown is not None
        there = text.shown[..., 0] > 0
        number = there.cumsum(-1)[..., -text.tokens :] - 1
        has = there[..., -text.tokens :] & (number < self.length)
        return y + p["e"][number.clamp(0, self.length - 1)] * has.unsqueeze(-1)
