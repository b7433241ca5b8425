"""Rows 13, 14 and 16: what is done to a delta outside of a step."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.numpy import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Row, Size, Work, interleave, row
from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.run import Run
from deltatune.core.swap import swap
from deltatune.training.optim import build_optimiser
from deltatune.training.settings import Settings

__all__ = ["rows"]

ALL = "attention.q|attention.k|attention.v|attention.output|ffn.gate|ffn.up|ffn.down"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHOD = f"lora(rank=8, at='{ALL}')"
FILE = "delta.safetensors"


def rows(size: Size) -> Iterator[Row]:
    """Measures rows 13, 14 and 16."""
    yield from _resident(size)
    yield from _files(size)
    yield from _attaching(size)
    yield _importing(size)
    yield _optimiser(size)


def llama(layers: int) -> Any:
    """A Llama of 768 features, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32000,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


def peer(model: nn.Module, name: str = "default") -> Any:
    """PEFT's LoRA on the same linear maps."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=MODULES)
    return peft.get_peft_model(model, config, adapter_name=name)


def _resident(size: Size) -> Iterator[Row]:
    layers = 12 if size.name == "full" else 4
    bank = api.attach(llama(layers), METHOD, slots=32)
    theirs = peer(llama(layers), "0")
    theirs.add_adapter("1", theirs.peft_config["0"])
    routes, names = itertools.cycle(range(32)), itertools.cycle("01")

    def activate() -> None:
        with bank.route([next(routes)]):
            pass

    times = interleave(
        {"ours": activate, "peer": lambda: theirs.set_adapter(next(names))}, 20 * size.rounds
    )
    yield row("13.1", "activate another resident delta, ms", 1e3 * times["ours"],
              peer=1e3 * times["peer"], over="itself", must=0.05)  # fmt: skip


def _trained(model: nn.Module, seed: int = 0) -> Delta:
    """A delta as after training: an artefact keeps nothing of what is zero."""
    delta = api.attach(model, METHOD, seed=seed)
    for row_of_leaves in delta.bank.parameters():
        row_of_leaves.data.normal_()
    return delta


def _files(size: Size) -> Iterator[Row]:
    layers = 12 if size.name == "full" else 4
    model = llama(layers)
    delta = _trained(model)
    theirs = peer(llama(layers))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = api.save(delta, folder / "one")
        theirs.save_pretrained(folder / "peer")
        other = api.save(_trained(llama(layers), seed=1), folder / "two")
        turns = itertools.cycle((other, saved))

        fresh = itertools.count()

        # Folders go at once: files that pile up wait for the disk, and whoever comes then pays.
        def save() -> None:
            shutil.rmtree(api.save(delta, folder / f"ours {next(fresh)}"))

        def save_without_fsync() -> None:  # as the peer does
            with mock.patch("os.fsync", new=lambda descriptor: None):
                save()

        def save_as_the_peer() -> None:
            to = folder / f"peer {next(fresh)}"
            theirs.save_pretrained(to)
            shutil.rmtree(to)

        tensors, content = delta.bank.read(0), np.empty((saved / FILE).stat().st_size, np.uint8)
        held = {name: value.detach().numpy() for name, value in tensors.items()}

        def write() -> None:
            save_file(held, folder / "floor")
            (folder / "floor").unlink()

        def read() -> None:
            with (saved / FILE).open("rb", buffering=0) as file:
                file.readinto(content.data)

        contenders: dict[str, Work] = {
            "safe": save,
            "save": save_without_fsync,
            "peer's save": save_as_the_peer,
            "write": write,
            "swap": lambda: swap(delta, next(turns)),
            "load": lambda: api.load(saved, model).detach(),
            "peer's swap": lambda: hotswap_adapter(theirs, str(folder / "peer"), "default"),
            "read": read,
        }
        ms = {name: 1e3 * held for name, held in interleave(contenders, size.rounds).items()}
        yield row("13.2", f"from disk into use, verified before (anew: {ms['load']:.3g}), ms",
                  ms["swap"], peer=ms["peer's swap"], floor=ms["read"], over="gain", must=20,
                  contenders=_named(contenders, "swap", "read"))  # fmt: skip
        yield row("14.1", f"save without fsync (with it: {ms['safe']:.3g}), ms", ms["save"],
                  peer=ms["peer's save"], floor=ms["write"], over="gain", must=3,
                  contenders=_named(contenders, "save", "write"))  # fmt: skip


def _named(contenders: Mapping[str, Work], ours: str, floor: str) -> dict[str, Work]:
    return {"floor": contenders[floor], "ours": contenders[ours],
            "peer": contenders[f"peer's {ours}"]}  # fmt: skip


def _attaching(size: Size) -> Iterator[Row]:
    with torch.device("meta"):
        mine, theirs = (LlamaForCausalLM(LlamaConfig(num_hidden_layers=32)) for _ in range(2))
    held: dict[str, Any] = {}

    def attach() -> None:
        held["delta"] = api.attach(mine, METHOD)

    def detach() -> None:
        held.pop("delta").detach()

    def wrap() -> None:
        held["peer"] = peer(theirs)

    def unwrap() -> None:
        held.pop("peer").unload()

    times = {name: float("inf") for name in ("attach", "detach", "wrap", "unwrap")}
    for _, (name, work) in itertools.product(
        range(size.rounds),
        (("attach", attach), ("wrap", wrap), ("detach", detach), ("unwrap", unwrap)),
    ):
        started = time.perf_counter()
        work()
        times[name] = min(times[name], time.perf_counter() - started)
    ms = {name: 1e3 * one for name, one in times.items()}
    yield row("14.2", "attach LoRA to 224 maps of a 7B Llama on meta, ms", ms["attach"],
              peer=ms["wrap"], over="gain", must=1.5)  # fmt: skip
    yield row("14.4", "detach it, ms", ms["detach"], peer=ms["unwrap"], over="gain",
              must=50)  # fmt: skip
    tracemalloc.start()
    attach()
    beside = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    own = held["delta"].bank.numel * 4
    yield row("14.3", "memory of what was attached over its tensors, MB", (own + beside) / 1e6,
              floor=own / 1e6, over="floor", must=1.05)  # fmt: skip
    detach()


def _importing(size: Size) -> Row:
    """Timed within a process that has torch: two whole processes differ by more than an import."""
    wanted = {"ours": "deltatune", "use": "deltatune; deltatune.attach", "peer": "peft"}
    seconds = dict.fromkeys(wanted, float("inf"))
    for _ in range(min(size.rounds, 5)):
        for name, module in wanted.items():
            timed = f"started = perf_counter(); import {module}; print(perf_counter() - started)"
            code = f"import torch; from time import perf_counter; {timed}"
            said = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            )
            seconds[name] = min(seconds[name], float(said.stdout))
    return row("14.5", f"import beyond torch (with the first use: {seconds['use']:.3g}), s",
               seconds["ours"], peer=seconds["peer"], floor=0.0, over="itself",
               must=0.15)  # fmt: skip


def _optimiser(size: Size) -> Row:
    """32 deltas of q and v on 12 layers: as 32 flat rows, as 1536 tensors, and as one tensor."""
    model = llama(12)
    bank = api.attach(model, "lora(rank=8)", slots=32)
    mine = build_optimiser(Run(bank), Settings(learning_rate=1e-4))
    shapes = [leaf.shape for leaf in bank.tensors(0).values()]
    theirs = [nn.Parameter(torch.zeros(shape)) for _ in range(32) for shape in shapes]
    default = torch.optim.AdamW(theirs, lr=1e-4)
    one = nn.Parameter(torch.zeros(sum(tensor.numel() for tensor in theirs)))
    least = torch.optim.AdamW([one], lr=1e-4, fused=True)
    for parameter in (*bank.parameters(), *theirs, one):
        parameter.grad = torch.randn_like(parameter)
    contenders = {"ours": mine.step, "peer": default.step, "floor": least.step}
    times = interleave(contenders, 2 * size.rounds)
    ms = {name: 1e3 * held for name, held in times.items()}
    return row("16", "optimiser step, 32 deltas, ms", ms["ours"], peer=ms["peer"],
               floor=ms["floor"], over="gain", must=6, contenders=contenders)  # fmt: skip
