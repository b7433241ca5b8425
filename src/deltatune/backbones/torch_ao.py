"""The storage of torchao's weight-only int8 tensors, as `quantize_` puts them into linear maps."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.quantised import Quantised
from deltatune.core.storage import add_storage

__all__ = ["TorchAO"]


class TorchAO(Quantised):
    """A linear map whose weight is an `Int8Tensor` of torchao that leaves inputs as they are."""

    def holds(self, module: nn.Module) -> bool:
        """See Storage."""
        library: Any = sys.modules.get("torchao.quantization")
        weight = module._parameters.get("weight")
        return (
            library is not None
            and isinstance(module, nn.Linear)
            and isinstance(weight, library.Int8Tensor)
            and weight.act_quant_kwargs is None
        )

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """See Storage."""
        assert isinstance(module, nn.Linear)
        return module.in_features, module.out_features

    def format(self, module: nn.Module) -> str:
        """See Quantised."""
        del module
        return "torchao_int8"

    def dequantise(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """See Quantised."""
        plain: Tensor = module._parameters["weight"].dequantize()  # type: ignore[union-attr]
        return plain.to(dtype)

    def stored(self, module: nn.Module) -> tuple[Tensor, ...]:
        """See Quantised."""
        weight: Any = module._parameters["weight"]
        return tuple(getattr(weight, name) for name in weight.__tensor_flatten__()[0])


add_storage(TorchAO())
