"""A run is a module like any other: for trainers, accelerators and compilers."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch.utils.data import DataLoader

from deltatune import api
from deltatune.core.errors import StateError
from deltatune.core.run import Run
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["llama"]


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = KIN.batch(rows=count)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in ids]


def loss(run: Run) -> float:
    run.eval()
    with torch.no_grad():
        return float(run(**torch.utils.data.default_collate(rows())).loss)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_accelerate_takes_it() -> None:
    run = Run(api.attach(KIN.build(), "adapter(bottleneck=4)"))
    before = loss(run)
    accelerator = accelerate.Accelerator(cpu=True)
    optimiser = torch.optim.AdamW(run.parameter_groups(0.02, 0.0))
    prepared: Any = accelerator.prepare(run, optimiser, DataLoader(rows(), batch_size=4))
    wrapped, optimiser, loader = prepared
    run.train()
    for _ in range(3):
        for batch in loader:
            optimiser.zero_grad()
            accelerator.backward(wrapped(**batch).loss)
            optimiser.step()
    assert loss(run) < before


def test_parameter_groups_are_one_for_each_slot() -> None:
    bank = Run(api.attach(KIN.build(), "lora", slots=3))
    groups = bank.parameter_groups(0.1, 0.2)
    assert [len(group["params"]) for group in groups] == [1, 1, 1]
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.1, 0.2)}
    control = Run(api.attach(KIN.build(), "full"))
    (group,) = control.parameter_groups(0.1, 0.0)
    assert len(group["params"]) == len(list(control.model.parameters()))
    control.delta.detach()
    with pytest.raises(StateError, match="nothing to train"):
        control.parameter_groups(0.1, 0.0)


def test_what_a_checkpoint_holds_is_put_back() -> None:
    run = Run(api.attach(KIN.build(), "lora", slots=2))
    state = run.trainable_state()
    assert {name.split("/")[0] for name in state} == {"0", "1"}
    move(run.delta)
    run.load_trainable_state(state)
    assert all(torch.equal(value, state[name]) for name, value in run.trainable_state().items())


def test_modes_of_delta_and_backbone_are_apart() -> None:
    run = Run(api.attach(KIN.build(), "lora"))
    run.train()
    assert run.delta.dropping and not run.model.training
    run.eval()
    assert not run.delta.dropping
    noisy = Run(api.attach(KIN.build(), "lora"), base_dropout=True)
    noisy.train()
    assert noisy.model.training


def test_compiled_models_see_a_delta_that_comes_later() -> None:
    torch._dynamo.reset()
    model = KIN.build().model.layers[0].mlp  # a whole model takes a minute to trace
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        base = compiled(x)
        delta = api.attach(model, "lora + bitfit", "up_proj | down_proj")
        move(delta)
        expected = model(x)
        close(compiled(x), expected)
        assert not torch.allclose(expected, base)
        delta.detach()
        close(compiled(x), base)
