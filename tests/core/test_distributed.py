"""Two processes give the gradients of one: data in parallel, and the backbone in shards."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import UnsupportedError
from deltatune.core.run import Run
from deltatune.core.whole import whole
from deltatune.testing.case import close, close_gradients, move
from deltatune.testing.families import FAMILIES

ROWS = 4
METHODS = {
    "t5": "lora(rank=2) + adapter(bottleneck=4) + bitfit + prefix(length=2) + prompt(length=2)",
    "llama": "lora(rank=2) + parallel(bottleneck=4) + last_layer + prompt(length=2)",
}


@dataclass(frozen=True)
class Way:
    """How the work is shared out.

    Attributes:
        shards: whether the backbone is sharded; else the data alone are parallel (DDP).
        attached_first: whether the delta was attached before the backbone was sharded.
        bank: whether the delta's own tensors are sharded too.
    """

    shards: bool
    attached_first: bool = True
    bank: bool = True


WAYS = {
    "ddp": Way(shards=False),
    "fsdp-delta_first-bank": Way(shards=True),
    "fsdp-delta_first": Way(shards=True, bank=False),
    "fsdp-delta_later-bank": Way(shards=True, attached_first=False),
    "fsdp-delta_later": Way(shards=True, attached_first=False, bank=False),
}


def attached(family: str, model: nn.Module) -> Delta:
    """Two slots, moved off their initial values."""
    bank = api.attach(model, METHODS[family], slots=2)
    twin = api.attach(FAMILIES[family].build(), METHODS[family], slots=2)
    for slot in range(2):  # drawn from whole weights, in whatever way the model is kept
        for name, value in twin.bank.read(slot).items():
            assert torch.equal(bank.bank.read(slot)[name], value)
    move(twin)
    for slot in range(2):
        bank.bank.write(slot, twin.bank.read(slot))
    return bank


def shard(model: nn.Module) -> None:
    """Every block by itself, then what is left."""
    for module in model.modules():
        if type(module).__name__ in ("T5Block", "LlamaDecoderLayer"):
            fully_shard(module)
    fully_shard(model)


def gradients(run: nn.Module, bank: Delta, family: str, rank: int | None) -> list[Tensor]:
    """The gradients of both slots: of one half of the rows, or, without a rank, of all of them."""
    kin = FAMILIES[family]
    batch, slots = kin.batch(rows=ROWS), [0, 1, 1, 0]
    mine = slice(None) if rank is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    with bank.route(slots[mine]):
        logits = run(**{name: value[mine] for name, value in batch.items()}).logits
    mask = batch["attention_mask"][mine][..., None] if kin.decoder_only else 1
    (logits * mask).square().mean().backward()
    return [row.grad for row in bank.bank.slots if row.grad is not None]


def share(way: Way, family: str, rank: int, folder: Path) -> tuple[Delta, list[Tensor]]:
    """The delta, and the gradients that this process ends up with."""
    model: Any = FAMILIES[family].build()
    if way.shards and not way.attached_first:
        model.requires_grad_(False)
        shard(model)
    bank = attached(family, model)
    run: nn.Module = Run(bank)
    if not way.shards:
        return bank, gradients(DistributedDataParallel(run), bank, family, rank)
    if way.attached_first:
        shard(model)
    if way.bank:
        fully_shard(run)
    found = gradients(run, bank, family, rank)
    api.save(bank, folder / f"{rank}", slot=1)
    with contextlib.suppress(UnsupportedError):
        bank.merge()
        raise AssertionError("a delta was merged into shards")
    if way.bank:
        return bank, [whole(gradient) for gradient in found]
    for gradient in found:  # what nobody shards, nobody else averages
        dist.all_reduce(gradient)
    return bank, [gradient / 2 for gradient in found]


def work(rank: int, folder: Path) -> None:
    # Rows of several slots are put together as a view, which FSDP warns not to change in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for family in METHODS:
        for name, way in WAYS.items():
            place = folder / f"{family}-{name}"
            bank, found = share(way, family, rank, place)
            torch.save(found, folder / f"{family}-{name}-{rank}.pt")
            bank.detach()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written."""
    place = tmp_path_factory.mktemp("distributed")
    mp.spawn(work, args=(place,), nprocs=2)
    return place


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("family", sorted(METHODS))
def test_two_processes_give_the_gradients_of_one(family: str, way: str, folder: Path) -> None:
    one, other = (
        torch.load(folder / f"{family}-{way}-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    model = FAMILIES[family].build()
    bank = attached(family, model)
    alone = gradients(Run(bank), bank, family, None)
    assert len(one) == len(other) == len(alone) == 2
    for mine, theirs, expected in zip(one, other, alone, strict=True):
        assert torch.equal(mine, theirs)
        close_gradients(mine, expected)
    if not WAYS[way].shards:
        return
    saved = FAMILIES[family].build()
    api.load(folder / f"{family}-{way}" / "0", saved)  # the backbone is known by its whole weights
    kin = FAMILIES[family]
    with torch.no_grad(), bank.route([1] * ROWS):
        close(kin.logits(saved, kin.batch(rows=ROWS)), kin.logits(model, kin.batch(rows=ROWS)))
