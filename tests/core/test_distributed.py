"""Data-parallel training on two processes gives the gradients of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from deltatune import api
from deltatune.core.run import Run
from deltatune.testing.case import close_gradients, move
from deltatune.testing.families import FAMILIES

ROWS = 4
METHODS = {
    "t5": "lora(rank=2) + adapter(bottleneck=4) + bitfit + prefix(length=2) + prompt(length=2)",
    "llama": "lora(rank=2) + parallel(bottleneck=4) + prompt(length=2)",
}


def gradients(family: str, half: int | None, folder: Path | None = None) -> list[Tensor]:
    """The gradients of both slots, on one half of the rows or on all of them."""
    kin = FAMILIES[family]
    model = kin.build()
    bank = api.attach(model, METHODS[family], slots=2)
    move(bank)
    run: torch.nn.Module = Run(bank)
    if folder is not None:
        run = DistributedDataParallel(run)
    batch, slots = kin.batch(rows=ROWS), [0, 1, 1, 0]
    mine = slice(None) if half is None else slice(half * ROWS // 2, (half + 1) * ROWS // 2)
    with bank.route(slots[mine]):
        logits = run(**{name: value[mine] for name, value in batch.items()}).logits
    mask = batch["attention_mask"][mine][..., None] if kin.decoder_only else 1
    (logits * mask).square().mean().backward()
    return [row.grad for row in bank.bank.slots if row.grad is not None]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for family in METHODS:
        torch.save(gradients(family, rank, folder), folder / f"{family}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written."""
    place = tmp_path_factory.mktemp("distributed")
    mp.spawn(work, args=(place,), nprocs=2)
    return place


@pytest.mark.parametrize("family", sorted(METHODS))
def test_two_processes_give_the_gradients_of_one(family: str, folder: Path) -> None:
    one, other = (torch.load(folder / f"{family}-{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = gradients(family, None)
    assert len(one) == len(other) == len(alone) == 2
    for mine, theirs, expected in zip(one, other, alone, strict=True):
        assert torch.equal(mine, theirs)
        close_gradients(mine, expected)
