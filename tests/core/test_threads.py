"""Threads share a model: each has its own routes and switches, and its own results."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from deltatune import api
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

METHODS = (
    "lora(rank=2)",
    "parallel(bottleneck=4)",
    "prompt(length=2)",
    "prefix(length=2)",
    "bitfit",
)
ROUTES = ([0] * 4, [1] * 4, [0, 1, None, 1], [None, None, 0, 0])


def answers(work: Callable[[list[int | None]], Tensor], threads: int) -> list[Tensor]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, ROUTES * 6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_every_thread_has_its_own_route(family: str, method: str) -> None:
    kin = FAMILIES[family]
    model = kin.build()
    bank = api.attach(model, method, slots=2)
    move(bank)

    def work(rows: list[int | None]) -> Tensor:
        with torch.no_grad(), bank.route(rows):
            return kin.logits(model, kin.batch())

    alone, together = answers(work, 1), answers(work, 4)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_threads_generate_side_by_side(family: str) -> None:
    kin = FAMILIES[family]
    model = kin.build()
    bank = api.attach(model, "lora(rank=2) + parallel(bottleneck=4) + prompt(length=2)", slots=2)
    move(bank)
    batch = {k: v for k, v in kin.batch().items() if k != "decoder_input_ids"}

    def work(rows: list[int | None]) -> Tensor:
        with torch.no_grad(), bank.route(rows):
            made: Tensor = model.generate(**batch, max_new_tokens=4, min_new_tokens=4)
            return made

    alone, together = answers(work, 1), answers(work, 4)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_a_switch_is_one_threads_own() -> None:
    kin = FAMILIES["llama"]
    model = kin.build()
    base = kin.logits(model, kin.batch())
    delta = api.attach(model, "lora(rank=2)")
    move(delta)
    with delta.active(False), ThreadPoolExecutor(1) as pool:
        assert torch.equal(kin.logits(model, kin.batch()), base)
        other = pool.submit(lambda: kin.logits(model, kin.batch())).result()
    assert not torch.equal(other, base)
