"""Row 7: a step of K LoRA runs over one base, against K steps of PEFT one after the other.

BERT of the base shape with 4 layers, whole steps with AdamW, K different deltas, K optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import Row, Size, Work, interleave, row
from benchmarks.steps import backward, base, floor, ids, loss, peer
from deltatune import api
from deltatune.testing.case import move

__all__ = ["rows"]

SHAPES = ((16, 4, 32, 3.0, 3.6), (8, 8, 64, 1.8, 1.95), (8, 8, 128, 2.2, 2.4))


def rows(size: Size) -> Iterator[Row]:
    """Measures row 7."""
    size = replace(size, layers=min(size.layers, 4))
    for number, (runs, examples, length, must, stretch) in enumerate(SHAPES, 1):
        times = interleave(
            {
                "ours": _together(size, runs, examples, length),
                "peer": _in_turn(size, runs, examples, length),
                "floor": backward(floor(size, size.dtype), ids(runs * examples, length)),
            },
            size.rounds,
        )
        ms = {name: 1e3 * held for name, held in times.items()}
        yield row(f"7.{number}", f"step of {runs} LoRA q,v runs of {examples} x {length}, ms",
                  ms["ours"], peer=ms["peer"], floor=ms["floor"], over="gain", must=must,
                  stretch=stretch)  # fmt: skip


def _together(size: Size, runs: int, examples: int, length: int) -> Work:
    model = base(size.layers, size.dtype)
    bank = api.attach(model, "lora(rank=8)", slots=runs)
    move(bank)
    optimisers = [torch.optim.AdamW([row], lr=1e-4, fused=True) for row in bank.bank.slots]
    batch = ids(runs * examples, length)
    slots = [slot for slot in range(runs) for _ in range(examples)]

    def step() -> None:
        with bank.route(slots):
            torch.autograd.backward(loss(model, batch) * runs)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()

    return step


def _in_turn(size: Size, runs: int, examples: int, length: int) -> Work:
    """One model serves: what differs between the runs is not what takes time."""
    model: Any = peer(size, size.dtype, "qv", 0.0)
    optimiser = torch.optim.AdamW(model.trained, lr=1e-4, fused=True)
    batch = ids(examples, length)

    def step() -> None:
        for _ in range(runs):
            torch.autograd.backward(loss(model, batch))
            optimiser.step()
            optimiser.zero_grad()

    return step
