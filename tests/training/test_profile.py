"""What a step holds: every byte that is counted is one that can be told beforehand."""

from __future__ import annotations

import torch
from torch import nn

from deltatune import api
from deltatune.core.run import Run
from deltatune.testing.families import FAMILIES
from deltatune.training.profile import Profile, profile
from deltatune.training.settings import Settings

SETTINGS = Settings(learning_rate=1e-3)


def measured(method: str, rows: int, length: int = 8) -> tuple[Profile, nn.Module, int]:
    model = FAMILIES["llama"].build()
    delta = api.attach(model, method)
    ids = torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    run = Run(delta)
    found = profile(run, batch if rows else None, SETTINGS, repeats=2)
    trained = sum(p.numel() for g in run.parameter_groups(1e-3, 0.0) for p in g["params"])
    delta.detach()
    return found, model, trained


def bytes_of(model: nn.Module) -> int:
    held = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.untyped_storage().nbytes() for t in held.values())


def test_a_delta_has_gradients_and_moments_of_its_own_entries_alone() -> None:
    found, model, trained = measured("lora(rank=2)", 2)
    assert found.gradients == 4 * trained
    assert 8 * trained <= found.optimiser <= 8 * trained + 64  # two moments, and counts of steps
    assert bytes_of(model) + 4 * trained <= found.static
    assert found.activations > 0
    assert min(found.forward, found.backward, found.update) > 0
    parts = found.static + found.activations + found.gradients + found.optimiser
    assert found.counted == parts
    assert found.peak >= found.static


def test_full_tuning_has_them_of_the_backbone() -> None:
    found, model, trained = measured("full", 2)
    assert trained == sum(p.numel() for p in model.parameters())
    assert found.gradients >= 4 * trained
    assert found.optimiser >= 8 * trained


def test_activations_grow_with_the_batch_and_nothing_else_does() -> None:
    small, _, _ = measured("bitfit", 2)
    large, _, _ = measured("bitfit", 6)
    assert 2.5 * small.activations < large.activations < 3.5 * small.activations
    assert (large.static, large.gradients) == (small.static, small.gradients)


def test_without_a_batch_there_is_only_what_stands() -> None:
    found, _, _ = measured("bitfit", 0)
    assert found.static == found.peak == found.counted > 0
    assert found.forward == 0.0
