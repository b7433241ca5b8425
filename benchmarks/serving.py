"""Rows 11 and 12: 32 requests over 32 deltas in one batch, against the bare base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, Size, Work, interleave, row
from benchmarks.life import METHOD, llama, peer
from benchmarks.steps import base, ids
from deltatune import api
from deltatune.testing.case import move

__all__ = ["rows"]

REQUESTS = 32
MIXED = (
    "lora(rank=8)",
    "adapter(bottleneck=16)",
    "bitfit",
    "prefix(length=10)",
    "prompt(length=10)",
)


def rows(size: Size) -> Iterator[Row]:
    """Measures rows 11 and 12."""
    bert = 12 if size.name == "full" else 2
    yield _served("11.1", "prefill of BERT, q and v, 32 tokens, ms", size, 1.1,
                  base(bert, size.dtype), base(bert, size.dtype), "lora(rank=8)",
                  ids(REQUESTS, 32))  # fmt: skip
    decoder = 6 if size.name == "full" else 2
    one, two = (llama(decoder).to(size.dtype) for _ in range(2))
    yield _served("11.2", "prefill of Llama, all-linear, 64 tokens, ms", size, 1.3, one, two,
                  METHOD, ids(REQUESTS, 64))  # fmt: skip
    yield from _one_token(size, decoder)
    yield _mixed(size, decoder)


def _served(
    id: str, metric: str, size: Size, must: float, bare: nn.Module, model: nn.Module, method: str,
    batch: Tensor,
) -> Row:  # fmt: skip
    bank = api.attach(model, method, slots=REQUESTS)
    move(bank)
    with bank.route(range(REQUESTS)), torch.inference_mode():
        times = interleave(
            {"floor": lambda: bare(input_ids=batch), "ours": lambda: model(input_ids=batch)},
            size.rounds,
        )
    return row(id, metric, 1e3 * times["ours"], floor=1e3 * times["floor"], over="floor",
               must=must)  # fmt: skip


def _one_token(size: Size, layers: int) -> Iterator[Row]:
    bare, model = (llama(layers).to(size.dtype) for _ in range(2))
    bank = api.attach(model, METHOD, slots=REQUESTS)
    move(bank)
    theirs: Any = peer(llama(layers).to(size.dtype), "0")
    for slot in range(1, REQUESTS):
        theirs.add_adapter(str(slot), theirs.peft_config["0"])
    theirs.eval()
    batch, names = ids(REQUESTS, 1), [str(slot) for slot in range(REQUESTS)]
    contenders: dict[str, Work] = {
        "floor": lambda: bare(input_ids=batch),
        "ours": lambda: model(input_ids=batch),
        "peer": lambda: theirs(input_ids=batch, adapter_names=names),
    }
    with bank.route(range(REQUESTS)), torch.inference_mode():
        times = interleave(contenders, 3 * size.rounds)
        ms = {name: 1e3 * held for name, held in times.items()}
        found = (
            row("11.3", "one token of Llama, all-linear, ms", ms["ours"], peer=ms["peer"],
                floor=ms["floor"], over="floor", must=1.7, contenders=contenders),
            row("11.4", "the same against PEFT's mixed batch, ms", ms["ours"], peer=ms["peer"],
                floor=ms["floor"], over="gain", must=4.5, contenders=contenders),
        )  # fmt: skip
    yield from found


def _mixed(size: Size, layers: int) -> Row:
    bare, model = (llama(layers).to(size.dtype) for _ in range(2))
    each = [REQUESTS // len(MIXED) + (k < REQUESTS % len(MIXED)) for k in range(len(MIXED))]
    deltas = [api.attach(model, method, slots=n) for method, n in zip(MIXED, each, strict=True)]
    for delta in deltas:
        move(delta)
    places = [(delta, slot) for delta in deltas for slot in range(delta.slots)]
    batch = ids(REQUESTS, 64)
    with api.route(model, places), torch.inference_mode():
        times = interleave(
            {"floor": lambda: bare(input_ids=batch), "ours": lambda: model(input_ids=batch)},
            size.rounds,
        )
    return row("12", "prefill of Llama, 32 deltas of 5 methods, 64 tokens, ms",
               1e3 * times["ours"], floor=1e3 * times["floor"], over="floor", must=1.6)  # fmt: skip
