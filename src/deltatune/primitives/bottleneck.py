"""The bottleneck that every adapter hangs somewhere: BN(x) = U σ(D x + c) + e."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.core.errors import UnknownNameError
from deltatune.core.leaf import Leaf, normal, zeros

__all__ = ["activation", "bottleneck", "bottleneck_leaves"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The nonlinearity called `name`. Raises UnknownNameError."""
    if name not in _ACTIVATIONS:
        raise UnknownNameError("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]


def bottleneck_leaves(
    inputs: int, middle: int, outputs: int, *, bias: bool, up_std: float
) -> dict[str, Leaf]:
    """D [middle, inputs], U [outputs, middle] and, with `bias`, c [middle] and e [outputs].

    D keeps the variance of its input. U is zero at `up_std` 0, so that the bottleneck starts as
    nothing.
    """
    weights = {
        "D": normal(middle, inputs, std=inputs**-0.5),
        "U": normal(outputs, middle, std=up_std) if up_std else zeros(outputs, middle),
    }
    return weights | ({"c": zeros(middle), "e": zeros(outputs)} if bias else {})


def bottleneck(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    """BN(x), [..., outputs], with the nonlinearity called `name`."""
    hidden = activation(name)(functional.linear(x, p["D"], p.get("c")))
    return functional.linear(hidden, p["U"], p.get("e"))
