"""Linear maps that keep their weight as int8, one scale for each output, on any device.

Weights are rounded, inputs are not: y = x (s · q)ᵀ + b. The weight is made from its codes at every
use, in the dtype of x, so that a training step keeps nothing of its size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune.core.low_rank import followed, linear_with
from deltatune.core.quantised import Quantised
from deltatune.core.storage import add_storage
from deltatune.core.whole import whole_parameter

__all__ = ["Int8Linear"]

_LARGEST = 127  # symmetric: -128 is not used


class Int8Linear(nn.Module):
    """A frozen linear map with an int8 weight.

    Attributes:
        weight: codes q, [outputs, inputs], int8; takes no gradient.
        scale: s, [outputs], fp32: the largest magnitude of a row over 127.
        bias: [outputs] or None, in the dtype that it came in.

    Args:
        weight: [outputs, inputs] in plain numbers.
        bias: taken over as it is.
    """

    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scale = wide.abs().amax(dim=1) / _LARGEST
        codes = wide / scale.masked_fill(scale == 0, 1.0)[:, None]
        self.weight = nn.Parameter(codes.round_().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """s · q, [outputs, inputs], as a new tensor."""
        codes, scale = whole_parameter(self, "weight"), whole_parameter(self, "scale")
        assert codes is not None and scale is not None
        return codes.to(dtype).mul_(scale.to(dtype)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """y, [..., outputs], from x, [..., inputs]."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if followed() or (self.bias is not None and self.bias.requires_grad):
            return functional.linear(x, self.dequantise(x.dtype), self.bias)
        return linear_with(x, self.dequantise, self.bias, [])

    def extra_repr(self) -> str:
        """What its repr says."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8(Quantised):
    """The storage of `Int8Linear`."""

    def holds(self, module: nn.Module) -> bool:
        """See Storage."""
        return isinstance(module, Int8Linear)

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """See Storage."""
        assert isinstance(module, Int8Linear)
        return module.in_features, module.out_features

    def format(self, module: nn.Module) -> str:
        """See Quantised."""
        del module
        return "int8"

    def dequantise(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """See Quantised."""
        assert isinstance(module, Int8Linear)
        return module.dequantise(dtype)

    def stored(self, module: nn.Module) -> tuple[Tensor, ...]:
        """See Quantised."""
        assert isinstance(module, Int8Linear)
        return module.weight, module.scale


add_storage(Int8())
