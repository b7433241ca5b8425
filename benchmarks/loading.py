"""Row 18: a LoRA from its folder onto a backbone and back, against PEFT, which compares nothing.

Ours holds every byte of the backbone and of the delta to a digest. What a contender puts on the
model or the disk is taken off again outside of the time. Both have the threads that torch takes by
itself, one for each core.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from torch import nn

from benchmarks.backbones import build
from benchmarks.harness import Row, Size, row
from deltatune import api
from deltatune.core.swap import swap

__all__ = ["rows"]

ROOT = Path(__file__).resolve().parent.parent
METHOD = "lora(rank=8, at='attention.q|attention.v')"
# A process that has the backbone, and nothing of either library.
FRESH = """
import sys, time
from benchmarks.backbones import build
kind, layers, contender, folder = sys.argv[1:]
model = build(kind, int(layers))
started = time.perf_counter()
if contender == "peer":
    from peft import PeftModel
    PeftModel.from_pretrained(model, folder)
else:
    import deltatune
    deltatune.load(folder, model)
print(time.perf_counter() - started)
"""


def rows(size: Size) -> Iterator[Row]:
    """Measures row 18."""
    whole, threads = size.name == "full", torch.get_num_threads()
    llama = "a Llama of 1.1B parameters, bf16" if whole else "two blocks of that Llama"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        layers = 12 if whole else 2
        yield from _loads("18.1", "BERT-base", ("bert", layers), ["query", "value"], size)
        layers = 22 if whole else 2
        yield from _loads("18.2", llama, ("llama", layers), ["q_proj", "v_proj"], size)
    finally:
        torch.set_num_threads(threads)


def _loads(
    id: str, name: str, backbone: tuple[str, int], modules: list[str], size: Size
) -> Iterator[Row]:
    model = build(*backbone)
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
        said = f"load a LoRA onto {name}, everything compared"
        yield row(f"{id}.1", f"{said}, {torch.get_num_threads()} threads, ms", cold["ours"],
                  peer=cold["peer"], floor=cold["floor"], over="peer", must=1)  # fmt: skip
        yield from _again(id, name, model, folders, size)
        fresh = _fresh(backbone, {"ours": folders[0], "peer": folders[2]}, min(size.rounds, 3))
        yield row(f"{id}.5", f"{said}, in a fresh process, with the import, s", fresh["ours"],
                  peer=fresh["peer"], over="peer", must=1)  # fmt: skip


def _fresh(backbone: tuple[str, int], folders: Mapping[str, Path], rounds: int) -> dict[str, float]:
    """The shortest time of each contender in seconds, each time in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    best = dict.fromkeys(folders, float("inf"))
    for _ in range(rounds):
        for name, folder in folders.items():
            command = [sys.executable, "-c", FRESH, *map(str, backbone), name, str(folder)]
            said = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment
            )
            best[name] = min(best[name], float(said.stdout))
    return best


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

    def read(value: torch.Tensor) -> None:
        held = value.detach().reshape(-1).view(torch.uint8).numpy()
        held[: held.size // 8 * 8].view(np.uint64).sum()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(read, model.state_dict().values()))


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
