"""Row 17: a frozen base in int8, its bytes and the time of a training step on it.

Int8 matrices compute in the dtype of the model around them, so that each base in plain numbers is
compared with int8 matrices in a model of its own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Row, Size, interleave, row
from benchmarks.steps import LINEAR, RANK, backward, base, ids
from deltatune import api
from deltatune.backbones import quantise
from deltatune.backbones.int8 import Int8Linear

__all__ = ["rows"]


def rows(size: Size) -> Iterator[Row]:
    """Measures row 17: one base in int8 and in plain numbers."""
    yield _bytes(size)
    yield _step("17.2", size, torch.bfloat16)
    yield _step("17.3", size, torch.float32)


def _int8(size: Size, dtype: torch.dtype) -> Any:
    model = base(size.layers, dtype)
    quantise(model, "int8")
    return model


def _bytes(size: Size) -> Row:
    model = _int8(size, torch.bfloat16)
    matrices = [module for module in model.modules() if isinstance(module, Int8Linear)]
    kept = sum(module.weight.nbytes + module.scale.nbytes for module in matrices)
    bf16 = sum(2 * module.weight.numel() for module in matrices)
    return row("17.1", "int8 matrices of BERT-base with their scales against bf16, MB", kept / 1e6,
               floor=bf16 / 1e6, over="floor", must=0.52)  # fmt: skip


def _step(id: str, size: Size, dtype: torch.dtype) -> Row:
    models = {"ours": _int8(size, dtype), "floor": base(size.layers, dtype)}
    batch = ids(8, 128)
    for model in models.values():
        api.attach(model, f"lora(rank={RANK}, at='{LINEAR['qv'][0]}')")
    steps = {name: backward(model, batch) for name, model in models.items()}
    ms = {name: 1e3 * held for name, held in interleave(steps, size.rounds).items()}
    name = str(dtype).removeprefix("torch.")
    return row(id, f"LoRA q,v step on an int8 base against {name}, ms", ms["ours"],
               floor=ms["floor"], over="floor", must=1.15)  # fmt: skip
