"""Dropout is the kernel's: its draws are keyed by (seed of the run, step, site)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["llama"]
METHOD = "lora(rank=3, dropout=0.5)"


def trained(seed: int = 0, step: int = 3) -> tuple[torch.nn.Module, Delta]:
    model = KIN.build()
    delta = api.attach(model, METHOD, seed=seed)
    move(delta)
    delta.train()
    at(delta, step)
    return model, delta


def at(delta: Delta, step: int) -> None:
    delta.keyed, delta.step = True, step


def test_off_in_evaluation_and_different_across_steps_and_seeds() -> None:
    model, delta = trained()
    batch = KIN.batch()
    first = KIN.logits(model, batch)
    assert torch.equal(KIN.logits(model, batch), first)  # the step has not changed
    at(delta, 4)
    assert not torch.equal(KIN.logits(model, batch), first)
    at(delta, 3)
    assert torch.equal(KIN.logits(model, batch), first)
    delta.seeds = (1,)
    assert not torch.equal(KIN.logits(model, batch), first)
    delta.eval()
    off = KIN.logits(model, batch)
    delta.seeds = (0,)
    assert torch.equal(KIN.logits(model, batch), off)


def test_a_bare_loop_counts_its_own_steps() -> None:
    model, delta = trained()
    delta.keyed = False
    batch = KIN.batch()
    first, second = KIN.logits(model, batch), KIN.logits(model, batch)
    assert not torch.equal(first, second) and delta.step == 5
    with torch.no_grad():
        KIN.logits(model, batch)
    assert delta.step == 5  # nothing is trained without gradients


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same(reentrant: bool) -> None:
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        model, delta = trained()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        KIN.logits(model, KIN.batch()).square().sum().backward()
        gradient = delta.bank.slots[0].grad
        assert gradient is not None
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_slot_draws_what_its_run_alone_draws() -> None:
    batch = KIN.batch(rows=6)
    model = KIN.build()
    bank = api.attach(model, METHOD, slots=3, seed=[5, 6, 7])
    move(bank)
    bank.train()
    at(bank, 9)
    rows = [0, 2, 2, 1, None, 0]
    with bank.route(rows):
        together = KIN.logits(model, batch)
    for slot, seed in enumerate((5, 6, 7)):
        alone, delta = trained(seed, step=9)
        delta.bank.write(0, bank.bank.read(slot))
        mine = [row for row, used in enumerate(rows) if used == slot]
        theirs = KIN.logits(alone, {name: value[mine] for name, value in batch.items()})
        torch.testing.assert_close(together[mine], theirs, rtol=1e-4, atol=1e-5)
