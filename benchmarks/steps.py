"""Rows 1 to 6: one training step of LoRA on a BERT of the base shape, its time and its memory.

The floor is the frozen base with embedded input that wants a gradient: forward and the gradient of
every input, no delta. All contenders have the same weights, data, factors and kernel of attention;
PEFT runs in its default mode (fp32 factors) and with `autocast_adapter_dtype=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.harness import Row, Size, Work, interleave, row, saved_bytes, step_memory
from deltatune import api

__all__ = ["rows"]

RANK, DROPOUT = 8, 0.1
LINEAR = {
    "all": (
        "attention.q | attention.k | attention.v | attention.output | ffn.up | ffn.down",
        ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    ),
    "qv": ("attention.q | attention.v", ["query", "value"]),
}


def rows(size: Size) -> Iterator[Row]:
    """Measures rows 1 to 6, memory first: it forks."""
    yield from _memory(size)
    yield from _kept(size)
    yield from _times(size)


def base(layers: int, dtype: torch.dtype, width: int = 768) -> Any:
    """A frozen BERT of the base shape, random weights, no dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = BertModel(config, add_pooling_layer=False)
    return model.to(dtype).requires_grad_(False)


def floor(size: Size, dtype: torch.dtype) -> Any:
    """The base alone, its embedded input wanting a gradient."""
    return floor_of(base(size.layers, dtype))


def floor_of(model: Any) -> Any:
    """A base whose embedded input wants a gradient."""
    model.embeddings.register_forward_hook(lambda *called: called[2].requires_grad_())
    return model


def ours(size: Size, dtype: torch.dtype, at: str, dropout: float) -> Any:
    """The base with our LoRA."""
    model = base(size.layers, dtype)
    delta = api.attach(model, f"lora(rank={RANK}, dropout={dropout}, at='{LINEAR[at][0]}')")
    delta.train()
    model.trained = list(delta.parameters())
    return model


def peer(size: Size, dtype: torch.dtype, at: str, dropout: float, *, cast: bool = True) -> Any:
    """The base with PEFT's LoRA."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=LINEAR[at][1]
    )
    model: Any = peft.get_peft_model(base(size.layers, dtype), config, autocast_adapter_dtype=cast)
    model.train()
    model.trained = [p for p in model.parameters() if p.requires_grad]
    return model


def full(size: Size, dtype: torch.dtype) -> Any:
    """The base, all of it trained."""
    model = base(size.layers, dtype).requires_grad_(True)
    model.trained = list(model.parameters())
    return model


def ids(examples: int, length: int) -> Tensor:
    """Token ids, all of one length."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(1000, 30000, (examples, length), generator=random)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss that every position has a part in."""
    found: Tensor = model(input_ids=batch).last_hidden_state.float().square().mean()
    return found


def backward(model: nn.Module, batch: Tensor) -> Work:
    """One forward and backward pass."""
    return lambda: torch.autograd.backward(loss(model, batch))


def _times(size: Size) -> Iterator[Row]:
    batch, dtype = ids(8, 128), size.dtype
    models = {
        "floor": floor(size, dtype),
        "ours all": ours(size, dtype, "all", 0.0),
        "peer all": peer(size, dtype, "all", 0.0),
        "peer all, cast": peer(size, dtype, "all", 0.0, cast=False),
        "ours all, dropout": ours(size, dtype, "all", DROPOUT),
        "peer all, dropout": peer(size, dtype, "all", DROPOUT),
        "ours qv": ours(size, dtype, "qv", 0.0),
    }
    works = {name: backward(model, batch) for name, model in models.items()}
    ms = _milliseconds(works, size)
    low, mine, theirs = ms["floor"], ms["ours all"], ms["peer all"]
    shown = {"floor": works["floor"], "ours": works["ours all"], "peer": works["peer all"]}
    yield row("1.1", "LoRA all-linear step, ms", mine, peer=theirs, floor=low, over="floor",
              must=1.35, stretch=1.2, contenders=shown)  # fmt: skip
    yield row("1.2", "the same against PEFT, ms", mine, peer=theirs, floor=low, over="gain",
              must=1.7, contenders=shown)  # fmt: skip
    yield row("1.3", "the same against PEFT with factors of the base's dtype, ms", mine,
              peer=ms["peer all, cast"], floor=low, over="gain", must=1.3,
              contenders={**shown, "peer": works["peer all, cast"]})  # fmt: skip
    mine, theirs = ms["ours all, dropout"], ms["peer all, dropout"]
    shown |= {"ours": works["ours all, dropout"], "peer": works["peer all, dropout"]}
    yield row("2.1", "LoRA all-linear step, dropout 0.1, ms", mine, peer=theirs, floor=low,
              over="floor", must=2.0, stretch=1.5, contenders=shown)  # fmt: skip
    yield row("2.2", "the same against PEFT, ms", mine, peer=theirs, floor=low, over="gain",
              must=2.3, stretch=3.0, contenders=shown)  # fmt: skip
    yield row("3", "LoRA q,v step, ms", ms["ours qv"], floor=low, over="floor", must=1.15,
              stretch=1.08,
              contenders={"floor": works["floor"], "ours": works["ours qv"]})  # fmt: skip
    fp32 = {
        "floor": backward(floor(size, torch.float32), batch),
        "ours": backward(ours(size, torch.float32, "qv", 0.0), batch),
        "peer": backward(peer(size, torch.float32, "qv", 0.0), batch),
    }
    ms = _milliseconds(fp32, size)
    yield row("4", "LoRA q,v step in fp32, ms", ms["ours"], peer=ms["peer"], floor=ms["floor"],
              over="gain", must=0.98, contenders=fp32)  # fmt: skip


def _milliseconds(works: dict[str, Work], size: Size) -> dict[str, float]:
    return {name: 1e3 * held for name, held in interleave(works, size.rounds).items()}


def _kept(size: Size) -> Iterator[Row]:
    batch = ids(8, 128)
    for number, dropout, must, stretch in (("5.1", 0.0, 0.65, 0.55), ("5.2", DROPOUT, 0.5, 0.4)):
        mine, theirs, low = (
            saved_bytes(model, partial(loss, model, batch)) / 1e6
            for model in (
                ours(size, size.dtype, "all", dropout),
                peer(size, size.dtype, "all", dropout),
                floor(size, size.dtype),
            )
        )
        yield row(number, f"kept for the backward pass, all-linear, dropout {dropout:g}, MB", mine,
                  peer=theirs, floor=low, over="peer", must=must, stretch=stretch)  # fmt: skip


def _memory(size: Size) -> Iterator[Row]:
    batch = ids(16, 128)

    def measured(make: Callable[[], nn.Module]) -> float:
        def prepare() -> Work:
            model: Any = make()
            optimiser = torch.optim.AdamW(model.trained, lr=1e-4)

            def step() -> None:
                torch.autograd.backward(loss(model, batch))
                optimiser.step()
                optimiser.zero_grad()

            return step

        return step_memory(prepare) / 1e6

    dtype = size.dtype
    for number, dropout, must in (("6.1", 0.0, 0.52), ("6.2", DROPOUT, 0.48)):
        mine = measured(partial(ours, size, dtype, "all", dropout))
        theirs = measured(partial(peer, size, dtype, "all", dropout))
        yield row(number, f"peak that a step adds, all-linear, dropout {dropout:g}, MB", mine,
                  peer=theirs, over="peer", must=must)  # fmt: skip
        if not dropout:
            whole = measured(lambda: full(size, dtype))
            yield row("6.3", "the same against full tuning, MB", mine, peer=whole, over="peer",
                      must=0.85)  # fmt: skip
