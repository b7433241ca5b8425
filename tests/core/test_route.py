"""Deltas of different methods in one batch: each row through its own."""

from __future__ import annotations

import pytest
import torch

from deltatune import api
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.testing.case import close, close_gradients, move
from deltatune.testing.families import FAMILIES

METHODS = ("lora(rank=3, at='attention.v')", "adapter(bottleneck=4)")
ROWS = [0, 0, 1, None, 0, 1, None]  # three through lora, two through adapters, two through none


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_as_if_alone(family: str) -> None:
    kin = FAMILIES[family]
    batch = kin.batch(rows=7)
    model = kin.build()
    deltas = [api.attach(model, method, seed=k) for k, method in enumerate(METHODS)]
    for delta in deltas:
        move(delta)
    with api.route(model, [None if k is None else deltas[k] for k in ROWS]):
        mixed = kin.logits(model, batch)
        mixed.square().sum().backward()
    base = kin.logits(kin.build(), batch)
    for row in (3, 6):
        close(mixed[row], base[row])
    for k, method in enumerate(METHODS):
        alone = kin.build()
        delta = api.attach(alone, method)
        delta.bank.write(0, deltas[k].bank.read(0))
        mine = [row for row, used in enumerate(ROWS) if used == k]
        logits = kin.logits(alone, batch)[mine]
        close(mixed[mine], logits)
        logits.square().sum().backward()
        gradient, wanted = deltas[k].bank.slots[0].grad, delta.bank.slots[0].grad
        assert gradient is not None and wanted is not None
        close_gradients(gradient, wanted)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_follows_the_rows_through_beams(family: str) -> None:
    kin = FAMILIES[family]
    batch = {k: v for k, v in kin.batch(left=kin.decoder_only).items() if k[:7] != "decoder"}
    model = kin.build()
    lora = api.attach(model, "lora", slots=2)
    prefix = api.attach(model, "prefix(length=2)", seed=1)
    prompt = api.attach(model, "prompt(length=2)", seed=2)
    for delta in (lora, prefix, prompt):
        move(delta)
    wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    rows = [(lora, 1), prefix, None, prompt]
    with torch.no_grad(), api.route(model, rows):
        together = model.generate(**batch, **wanted)
    for index, row in enumerate(rows):
        one = {name: value[index : index + 1] for name, value in batch.items()}
        with torch.no_grad(), api.route(model, [row]):
            alone = model.generate(**one, **wanted)
        assert torch.equal(together[index, -4:], alone[0, -4:]), index


WANTED = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_generation_with_caches_of_one_shape(family: str) -> None:
    """Static caches keep every shape the same; a prompt has no room in one, and says so."""
    kin = FAMILIES[family]
    model, batch = kin.build(), kin.batch(left=True)
    lora = api.attach(model, "lora", slots=2)
    prefix = api.attach(model, "prefix(length=2)", seed=1)
    adapter = api.attach(model, "adapter(bottleneck=4) + bitfit", seed=2)
    for delta in (lora, prefix, adapter):
        move(delta)
    with torch.no_grad(), api.route(model, [(lora, 1), prefix, None, adapter]):
        grown = model.generate(**batch, **WANTED)
        static = model.generate(**batch, **WANTED, cache_implementation="static")
    assert torch.equal(grown, static)
    for delta in (lora, prefix, adapter):
        delta.detach()
    api.attach(model, "prompt(length=2)")
    with pytest.raises(UnsupportedError, match="use a dynamic cache"):
        model.generate(**batch, **WANTED, cache_implementation="static")


def test_rows_are_named_by_delta_or_by_name() -> None:
    kin = FAMILIES["llama"]
    model = kin.build()
    delta = api.attach(model, "lora")
    move(delta)
    with api.route(model, [delta, "lora", ("lora", 0), (delta, 0)]):
        named = kin.logits(model, kin.batch())
    assert torch.equal(named, kin.logits(model, kin.batch()))
    with (
        pytest.raises(UnknownNameError, match="no attached delta 'lorra'"),
        api.route(model, ["lorra"]),
    ):
        pass


def test_rows_of_a_strange_or_ambiguous_delta_are_refused() -> None:
    kin = FAMILIES["llama"]
    model, other = kin.build(), kin.build()
    stranger = api.attach(other, "lora(rank=2)")
    twins = [api.attach(model, "lora(rank=2)") for _ in range(2)]
    with (
        pytest.raises(StateError, match="not attached to this model"),
        api.route(model, [stranger]),
    ):
        pass
    with (
        pytest.raises(ConfigurationError, match="2 attached deltas are called"),
        api.route(model, ["lora(rank=2)"]),
    ):
        pass
    with pytest.raises(ConfigurationError, match="no slot 4"), api.route(model, [(twins[1], 4)]):
        pass
    assert all(twin.rows.slots == (0,) for twin in twins)  # nothing stays routed after a refusal


def test_slices_of_a_fused_projection_leave_the_others_alone() -> None:
    kin = FAMILIES["gpt2"]
    model = kin.build()
    delta = api.attach(model, "lora(rank=2)", "attention.q")
    move(delta)
    fused = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tuned = fused(x)
        with delta.active(False):
            base = fused(x)
        leaves = delta.tensors()
        A, B = (leaves[f"lora/transformer.h.0.attn.c_attn[q]/{n}"] for n in "AB")
        torch.testing.assert_close(tuned[..., :32] - base[..., :32], 8.0 * (x @ A.T @ B.T))
        assert torch.equal(tuned[..., 32:], base[..., 32:])
        delta.merge()
        torch.testing.assert_close(fused(x), tuned)
        assert torch.equal(
            fused.weight[:, 32:], kin.build().transformer.h[0].attn.c_attn.weight[:, 32:]
        )
