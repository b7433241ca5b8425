"""How a forward pass is computed: its precision, and the attention kernel that trains fastest.

On the CPU, torch answers `scaled_dot_product_attention` by a flash kernel whose backward pass in
half precision may take three times as long as that of plain products (on processors with and
without AMX, below about 512 tokens); in fp32 the two are alike. What transformers calls "sdpa" goes
through that function, so that the choice is made here, from a table that is measured where it is
needed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["forward_context", "plain_is_faster"]

_LENGTHS = (32, 64, 128, 256, 512)  # beyond, the plain products keep too much for the backward pass
_GAIN = 1.25  # how much faster the plain products must be, so that noise decides nothing
_HEADS, _WIDTH, _TOKENS, _ROUNDS = 2, 64, 512, 3


@contextmanager
def forward_context(
    model: nn.Module, precision: str, device: torch.device, batch: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within it a batch goes through a model.

    Args:
        model: whose first parameter gives the dtype of fp32 passes.
        precision: "fp32" to compute in the dtypes of the model, "bf16" for autocast.
        device: of the model.
        batch: its longest row decides the kernel.
    """
    bf16 = precision == "bf16"
    dtype = torch.bfloat16 if bf16 else next(model.parameters()).dtype
    length = max((held.shape[1] for held in batch.values() if held.dim() > 1), default=0)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        _attention_kernel(device, dtype, length),
    ):
        yield


def _attention_kernel(
    device: torch.device, dtype: torch.dtype, length: int
) -> AbstractContextManager[None]:
    """The attention kernel that trains fastest; only a CPU has a choice to make."""
    fitting = [held for held in _LENGTHS if held >= length]
    if device.type == "cpu" and fitting and plain_is_faster(dtype, fitting[0]):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@functools.cache
def plain_is_faster(dtype: torch.dtype, length: int) -> bool:
    """Whether plain products train clearly faster than the flash kernel, by a short measurement."""
    times = {kernel: float("inf") for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)}
    shape = (_TOKENS // length, _HEADS, length, _WIDTH)
    q, k, v = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    # With a mask, as padding asks for; without one other kernels might be at work.
    mask = torch.ones(shape[0], 1, length, length, dtype=torch.bool)
    with torch.enable_grad():
        for _ in range(_ROUNDS):
            for kernel in times:
                started = time.perf_counter()
                with sdpa_kernel(kernel):
                    output = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                torch.autograd.grad(output.sum(), (q, k, v))
                times[kernel] = min(times[kernel], time.perf_counter() - started)
    return times[SDPBackend.FLASH_ATTENTION] > _GAIN * times[SDPBackend.MATH]
