"""Storages of transformers' own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltatune.core.storage import Storage, add_storage

__all__ = ["TransposedLinear"]


class TransposedLinear(Storage):
    """GPT-2's `Conv1D`: a linear map that keeps its weight as (in, out)."""

    linear = adds_bias = True

    def holds(self, module: nn.Module) -> bool:
        """See Storage."""
        return type(module).forward is Conv1D.forward

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """See Storage."""
        weight = module._parameters["weight"]
        assert weight is not None
        return weight.shape[0], weight.shape[1]

    def view(self, weight: Tensor) -> Tensor:
        """See Storage."""
        return weight.T

    def compute(
        self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """See Storage."""
        del module
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], -1)


add_storage(TransposedLinear())
