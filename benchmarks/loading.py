"""Row 18: a LoRA from its folder onto a backbone and back, against PEFT, which compares nothing.

Ours holds every byte of the backbone and of the delta to a digest. What a contender puts on the
model or the disk is taken off again outside of the time.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Row, Size, row
from deltatune import api
from deltatune.core.swap import swap

__all__ = ["rows"]

METHOD = "lora(rank=8, at='attention.q|attention.v')"


def rows(size: Size) -> Iterator[Row]:
    """Measures row 18."""
    whole = size.name == "full"
    yield from _loads("18.1", "BERT-base", _bert(12 if whole else 2), ["query", "value"], size)
    name = "a Llama of 1.1B parameters, bf16" if whole else "two blocks of that Llama"
    llama = _llama(22 if whole else 2)
    yield from _loads("18.2", name, llama, ["q_proj", "v_proj"], size)


def _bert(layers: int) -> Any:
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(num_hidden_layers=layers))
    return model.eval()


def _llama(layers: int) -> Any:
    """TinyLlama's configuration, random weights."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: Any = LlamaForCausalLM(config)
        return model.eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _loads(id: str, name: str, model: Any, modules: list[str], size: Size) -> Iterator[Row]:
    delta = api.attach(model, METHOD)
    for values in delta.bank.parameters():
        values.data.normal_(0, 0.01)
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / kind for kind in ("one", "two", "peer")]
        api.save(delta, folders[0])
        for values in delta.bank.parameters():
            values.data.normal_(0, 0.01)
        api.save(delta, folders[1])
        delta.detach()
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=modules)
        theirs = peft.get_peft_model(model, config)
        theirs.save_pretrained(str(folders[2]))
        model = theirs.unload()
        cold = _timed(
            {
                "ours": (lambda: api.load(folders[0], model), lambda made: made.detach()),
                "peer": (
                    lambda: peft.PeftModel.from_pretrained(model, folders[2]),
                    lambda made: made.unload(),
                ),
                "floor": (lambda: _read(model), lambda _: None),
            },
            size.rounds,
        )
        yield row(f"{id}.1", f"load a LoRA onto {name}, everything compared, ms", cold["ours"],
                  peer=cold["peer"], floor=cold["floor"], over="peer", must=1)  # fmt: skip
        yield from _again(id, name, model, folders, size)


def _again(id: str, name: str, model: Any, folders: list[Path], size: Size) -> Iterator[Row]:
    """A further delta beside one, and another in the place of one that was verified before."""
    delta, turns = api.load(folders[0], model), itertools.cycle((folders[1], folders[0]))
    swap(delta, folders[1])
    to, names = folders[2].parent / "saved", itertools.count()

    def save() -> Path:  # without fsync, as the peer does
        with mock.patch("os.fsync", new=lambda descriptor: None):
            return api.save(delta, to)

    mine = _timed(
        {
            "beside": (lambda: api.load(folders[0], model), lambda made: made.detach()),
            "in its place": (lambda: swap(delta, next(turns)), lambda _: None),
            "save": (save, shutil.rmtree),
        },
        size.rounds,
    )
    delta.detach()
    theirs = peft.PeftModel.from_pretrained(model, folders[2])

    def save_as_the_peer() -> Path:
        theirs.save_pretrained(str(to))
        return to

    def add() -> str:
        own = f"adapter {next(names)}"
        theirs.load_adapter(folders[2], own)
        return own

    saved = _timed({"peer": (save_as_the_peer, shutil.rmtree)}, size.rounds)["peer"]
    peer = _timed({"peer": (add, theirs.delete_adapter)}, size.rounds)["peer"]
    theirs.unload()
    yield row(f"{id}.2", f"a further LoRA beside it on {name}, ms", mine["beside"], peer=peer,
              over="peer", must=1)  # fmt: skip
    yield row(f"{id}.3", f"another in its place that was verified before, on {name}, ms",
              mine["in its place"], peer=peer, over="gain", must=20)  # fmt: skip
    yield row(f"{id}.4", f"save it, the backbone known, without fsync, on {name}, ms",
              mine["save"], peer=saved, over="peer", must=1)  # fmt: skip


def _read(model: nn.Module) -> None:
    """Every byte of the backbone, once, as whole numbers of eight bytes."""
    for value in model.state_dict().values():
        held = value.detach().reshape(-1).view(torch.uint8).numpy()
        held[: held.size // 8 * 8].view(np.uint64).sum()


def _timed(
    contenders: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]], rounds: int
) -> dict[str, float]:
    """The shortest time of each in milliseconds, over rounds in random order, what it undoes apart.

    Every contender runs once before the first round.
    """
    order, best = random.Random(0), dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds + 1):
        for name in order.sample(list(contenders), len(contenders)):
            work, undo = contenders[name]
            started = time.perf_counter()
            made = work()
            seconds = time.perf_counter() - started
            undo(made)
            if turn:
                best[name] = min(best[name], 1e3 * seconds)
    return best
