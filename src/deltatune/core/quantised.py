"""Quantised maps: linear maps whose weight is kept as codes and scales, and what they count as.

A storage of this kind says how plain numbers are made of the codes. All else is derived from that:
every face sees the plain numbers, and counts are those of the matrix, not of its codes.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune.core.low_rank import Weight
from deltatune.core.storage import Storage, storage_of

__all__ = [
    "Quantised",
    "base_bytes",
    "count_parameters",
    "error_of",
    "format_of",
    "keep_error",
    "shape_of",
]

Rows = tuple[int, int] | None  #: of the outputs of a fused map; None for all
Factors = tuple[Tensor, Tensor]  #: A [rank, inputs] and B [outputs, rank]

_ERROR = "_deltatune_error"  # on a module: what quantising took from its weight, by rows


class Quantised(Storage):
    """A linear map that makes its weight from codes at every use.

    The plain numbers are kept neither by the module nor for the backward pass.
    """

    linear = adds_bias = True

    @abc.abstractmethod
    def format(self, module: nn.Module) -> str:
        """What the weight is kept as: "int8", "nf4"."""

    @abc.abstractmethod
    def dequantise(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The weight in plain numbers, (out, in), as a new tensor."""

    @abc.abstractmethod
    def stored(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The tensors that the weight is kept in: the codes and their scales."""

    def dense(self, module: nn.Module) -> tuple[Weight, Tensor | None] | None:
        """See Storage."""
        return functools.partial(self.dequantise, module), module._parameters.get("bias")

    def compute(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Storage. A folded weight comes in fp32, whatever the model computes in."""
        del module
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def shape_of(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of one of a module's own parameters in plain numbers; None if there is none."""
    parameter, storage = module._parameters.get(name), storage_of(module)
    if parameter is None:
        return None
    if name == "weight" and isinstance(storage, Quantised):
        inputs, outputs = storage.widths(module)
        return outputs, inputs
    return tuple(parameter.shape)


def keep_error(module: nn.Module, factors: Mapping[Rows, Factors]) -> None:
    """Remembers a low-rank part of W - Q(W) beside the codes. It is no part of the model's state.

    Args:
        module: a quantised map.
        factors: B A, for all outputs or for slices of a fused map; the largest triplets first.
    """
    if factors:
        module.__dict__[_ERROR] = dict(factors)


def error_of(module: nn.Module, rows: Rows = None) -> Factors | None:
    """What `keep_error` kept of these rows; None if it kept nothing of them."""
    held: Mapping[Rows, Factors] = module.__dict__.get(_ERROR, {})
    return held.get(rows)


def count_parameters(model: nn.Module) -> int:
    """Entries of all distinct parameters of a model, in plain numbers."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                counts[id(parameter)] = math.prod(shape_of(module, name) or ())
    return sum(counts.values())


def base_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters of a model, as they are kept, with the scales of codes."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        storage = storage_of(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            kept: tuple[Tensor, ...] = (parameter,)
            if name == "weight" and isinstance(storage, Quantised):
                kept = storage.stored(module)
            sizes[id(parameter)] = sum(tensor.nbytes for tensor in kept)
    return sum(sizes.values())


def format_of(model: nn.Module) -> str | None:
    """What the quantised maps of a model are kept as, several formats joined by "+"; None if there
    are none.
    """
    found = {
        storage.format(module)
        for module in model.modules()
        if isinstance(storage := storage_of(module), Quantised)
    }
    return "+".join(sorted(found)) or None
