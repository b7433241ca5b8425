"""The bottleneck that every adapter hangs somewhere: BN(x) = U σ(D x + c) + e."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.leaf import Leaf, normal, zeros
from deltatune.core.method import Category, ReviewCategory
from deltatune.core.site import Site

__all__ = ["ACTIVATIONS", "Bottleneck"]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "identity": _identity,
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What methods with a bottleneck have in common; a method says where it hangs.

    Attributes:
        bottleneck: m, the width in the middle.
        activation: σ: gelu, gelu_tanh, relu, silu, tanh or identity.
        bias: whether c and e exist.
        up_std: standard deviation of U at the start; 0 is the exact identity.
    """

    bottleneck: int = 64
    activation: str = "relu"
    bias: bool = True
    up_std: float = 0.0

    name: ClassVar[str]
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "2dm + m + d"
    default_at: ClassVar[str] = "attention | ffn"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        """Raises ConfigurationError for a width below 1, UnknownNameError for a nonlinearity."""
        if self.bottleneck < 1 or self.up_std < 0:
            raise ConfigurationError(
                f"bottleneck must be at least 1 and up_std at least 0; found {self}."
            )
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", self.activation, ACTIVATIONS)

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """The leaves of a bottleneck that reads what it is added to."""
        return self.leaves(site.outputs, site.outputs)

    def leaves(self, inputs: int, outputs: int) -> dict[str, Leaf]:
        """D [m, inputs], U [outputs, m] and, with `bias`, c [m] and e [outputs].

        D keeps the variance of its input. U is zero at `up_std` 0, so that the start is nothing.
        """
        m = self.bottleneck
        up = normal(outputs, m, std=self.up_std) if self.up_std else zeros(outputs, m)
        down = normal(m, inputs, std=inputs**-0.5)
        return {"D": down, "U": up, **self.biases(outputs)}

    def biases(self, outputs: int) -> dict[str, Leaf]:
        """c [m] and e [outputs], zero; none without `bias`."""
        return {"c": zeros(self.bottleneck), "e": zeros(outputs)} if self.bias else {}

    def apply(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """BN(x), [..., outputs], of x [..., inputs]."""
        hidden = ACTIVATIONS[self.activation](functional.linear(x, p["D"], p.get("c")))
        return functional.linear(hidden, p["U"], p.get("e"))
