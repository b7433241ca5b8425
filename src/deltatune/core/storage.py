"""Storages: how a module keeps its weight, and how to compute with another one in its place.

Most modules are computed with the folded weight directly, which is safe across threads. A module
that no storage knows is called with the folded parameter shadowing its own for the time of the
call.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune.core.low_rank import Weight

__all__ = ["Storage", "add_storage", "storage_of", "wide"]


class Storage(abc.ABC):
    """One way of keeping a weight. `weight` is as the module keeps it; a view is (out, in)."""

    linear: bool = False  #: whether the module is y = x Wᵀ + b
    adds_bias: bool = False  #: whether its bias is added to its output

    @abc.abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether `module` keeps its weight this way."""

    @abc.abstractmethod
    def widths(self, module: nn.Module) -> tuple[int, int]:
        """(input features, output features) of the module."""

    def view(self, weight: Tensor) -> Tensor:
        """The weight as (out, in). Its own inverse."""
        return weight

    def dense(self, module: nn.Module) -> tuple[Weight, Tensor | None] | None:
        """Of a linear map: its weight as (out, in), or what makes it, and its bias. None of what is
        no plain product with a weight.
        """
        weight = module._parameters.get("weight")
        if not self.linear or weight is None or not weight.is_floating_point():
            return None
        return self.view(weight), module._parameters.get("bias")

    def compute(
        self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """The module's output with another weight and bias; None if this storage cannot say."""
        del module, x, weight, bias
        return None


class _Linear(Storage):
    linear = adds_bias = True

    def holds(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    def widths(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.in_features, module.out_features

    def compute(
        self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        del module
        return functional.linear(x, weight, bias)


class _Embedding(Storage):
    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)  # those that scale what they give, too

    def widths(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings, module.embedding_dim


class _LayerNorm(Storage):
    adds_bias = True

    def holds(self, module: nn.Module) -> bool:
        return type(module).forward is nn.LayerNorm.forward

    def widths(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.LayerNorm)
        return module.normalized_shape[-1], module.normalized_shape[-1]

    def compute(
        self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        assert isinstance(module, nn.LayerNorm)
        return functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class _Other(Storage):
    """Any module that owns parameters; the widths are those of its weight, or of its first
    parameter.
    """

    def holds(self, module: nn.Module) -> bool:
        del module
        return True

    def widths(self, module: nn.Module) -> tuple[int, int]:
        first = next((p for p in module._parameters.values() if p is not None), None)
        if first is None or first.dim() == 0:
            return 0, 0
        return first.shape[-1], first.shape[0] if first.dim() > 1 else first.shape[-1]


_OTHER = _Other()
_STORAGES: list[Storage] = [_Linear(), _Embedding(), _LayerNorm()]


def add_storage(storage: Storage) -> None:
    """Makes the kernel ask `storage` before those it knows already."""
    if not any(type(known) is type(storage) for known in _STORAGES):
        _STORAGES.insert(0, storage)


def storage_of(module: nn.Module) -> Storage:
    """The storage of `module`."""
    return next((storage for storage in _STORAGES if storage.holds(module)), _OTHER)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in fp32, in which every fold is computed."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
