"""Storages of bitsandbytes: 4-bit weights (NF4, FP4) and LLM.int8().

Dettmers et al. 2023, arXiv:2305.14314 (QLoRA) and 2022, arXiv:2208.07339 (LLM.int8()). The modules
may come from `BitsAndBytesConfig` of transformers or stand in any model. The library is never
imported here before it has made a module: it takes seconds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.low_rank import Weight
from deltatune.core.quantised import Quantised
from deltatune.core.storage import add_storage

__all__ = ["FourBit", "LLMInt8"]


class FourBit(Quantised):
    """`Linear4bit`: codes of 4 bits, a scale for each block of them, itself a code or not."""

    def holds(self, module: nn.Module) -> bool:
        """See Storage."""
        return _is(module, "Linear4bit")

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """See Storage."""
        return _widths(module)

    def format(self, module: nn.Module) -> str:
        """See Quantised."""
        kind: str = _weight(module).quant_type
        return kind

    def dense(self, module: nn.Module) -> tuple[Weight, Tensor | None] | None:
        """See Storage. No plain product where a forward on the CPU computes in bf16 by AVX512-BF16:
        a difference is added to what the module gives, so that a fresh delta changes nothing.
        """
        on_cpu = _weight(module).device.type == "cpu"
        own_kernel = on_cpu and getattr(module, "support_avx512bf16_for_cpu", False)
        return None if own_kernel else super().dense(module)

    def dequantise(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """See Quantised."""
        from bitsandbytes import functional

        codes, state = _weight(module).data, _weight(module).quant_state
        if getattr(state, "packing_format_for_cpu", False):  # laid out for AVX512-BF16 by a forward
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        plain: Tensor = functional.dequantize_4bit(codes, state)
        return plain.to(dtype)

    def stored(self, module: nn.Module) -> tuple[Tensor, ...]:
        """See Quantised."""
        state = _weight(module).quant_state
        scales = () if state is None else (state.absmax,)
        nested = (state.state2.absmax,) if scales and state.nested else ()
        return _weight(module), *scales, *nested


class LLMInt8(Quantised):
    """`Linear8bitLt`: int8 weights, and in evaluation (on a GPU in training too) int8 inputs.

    A difference is added to what the module gives, so that a fresh delta changes nothing. A folded
    weight is computed in plain numbers.
    """

    def holds(self, module: nn.Module) -> bool:
        """See Storage."""
        return _is(module, "Linear8bitLt")

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """See Storage."""
        return _widths(module)

    def format(self, module: nn.Module) -> str:
        """See Quantised."""
        del module
        return "llm_int8"

    def dense(self, module: nn.Module) -> None:
        """See Storage: the inputs are rounded too, so that it is no plain product."""
        del module

    def dequantise(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """See Quantised."""
        codes, scale = self.stored(module)
        return codes.to(dtype).mul_(scale.to(dtype)[:, None] / 127)

    def stored(self, module: nn.Module) -> tuple[Tensor, ...]:
        """See Quantised. The first forward moves the scales from the weight into the module."""
        weight, state = _weight(module), module.__dict__["state"]
        return weight.data, weight.SCB if weight.SCB is not None else state.SCB


def _is(module: nn.Module, kind: str) -> bool:
    library: Any = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, getattr(library.nn, kind))


def _weight(module: nn.Module) -> Any:
    return module._parameters["weight"]


def _widths(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


add_storage(FourBit())
add_storage(LLMInt8())
