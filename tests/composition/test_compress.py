"""What arithmetic gives is a delta like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.composition.plain import MODEL, SEEDS, change, flat
from torch import Tensor

from deltatune import api
from deltatune.backbones.load import load_backbone
from deltatune.composition import Change, add, as_delta, dare, effective
from deltatune.composition.change import Product
from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_nothing_is_lost_where_the_rank_is_free(seed: int) -> None:
    one = change(seed)
    composed = as_delta(one)
    torch.testing.assert_close(flat(effective(composed.delta)), flat(one), rtol=1e-5, atol=1e-5)
    assert composed.error < 1e-6 and set(composed.errors) == set(one)
    composed.delta.detach()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_truncation_is_the_nearest_and_its_error_is_told(seed: int, rank: int, held: int) -> None:
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, held, generator=random) for n in (40, 30))
    dense = left @ right.mT
    model = torch.nn.Sequential(torch.nn.Linear(30, 40))
    values = np.linalg.svd(dense.double().numpy(), compute_uv=False)
    wanted = np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())
    for part in (dense, Product(left, right.mT)):
        composed = as_delta(Change(model, {"0.weight": part}), rank=rank)
        off = effective(composed.delta)["0.weight"] - dense
        found = float(off.double().norm() / dense.double().norm())
        assert abs(found - wanted) < 1e-5 and abs(composed.error - wanted) < 1e-5
        assert composed.delta.bank.numel == min(rank, held) * 70
        composed.delta.detach()


def test_rank_is_what_the_sum_needs() -> None:
    model = FAMILIES["bert"].build()
    a, b = (api.attach(model, f"lora(rank={rank})", seed=rank) for rank in (2, 3))
    move(a)
    move(b, 1)
    ea, eb = effective(a), effective(b)

    def ranks(one: Change) -> set[int]:
        made = as_delta(one).delta
        made.detach()
        return {method.rank for method in made.expression}  # type: ignore[attr-defined]

    assert ranks(ea + eb) == {5} and ranks(ea + ea) == {2} and ranks(ea - ea) == {1}
    assert as_delta(ea - ea).error == 0.0


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2", "llama"])
def test_a_difference_of_deltas_lives_like_any_delta(family: str, tmp_path: Path) -> None:
    """a + 2 b - b, of three methods, is a + b attached: the same logits, saved, merged, routed."""
    kin = FAMILIES[family]
    model = kin.build().requires_grad_(False)
    a = api.attach(model, "lora(rank=2, at='attention.q | ffn')", seed=1)
    b = api.attach(model, "bitfit(at='linear') + lora(rank=3, at='attention.q')", seed=2)
    move(a, 1)
    move(b, 2)
    with torch.no_grad():
        wanted = kin.logits(model, kin.batch())
        change = effective(a) + 2 * effective(b) - effective(b)
        a.detach()
        b.detach()
        alone = kin.logits(model, kin.batch())
        composed = as_delta(change).delta
        assert {method.name for method in composed.expression} == {"lora", "difference"}
        close(kin.logits(model, kin.batch()), wanted)
        folder = api.save(composed, tmp_path / "sum")
        composed.detach()
        assert kin.logits(model, kin.batch()).equal(alone)
        loaded = api.load(folder, model)
        close(kin.logits(model, kin.batch()), wanted)
        with loaded.route([0, None, 0, None]):
            routed = kin.logits(model, kin.batch())
        close(routed[::2], wanted[::2])
        close(routed[1::2], alone[1::2])
    loaded.detach()


def test_it_merges_and_comes_out_again() -> None:
    model = FAMILIES["bert"].build()
    kin, before = FAMILIES["bert"], {n: v.clone() for n, v in model.state_dict().items()}
    a, b = (api.attach(model, method) for method in ("lora(rank=2)", "ln_tuning"))
    move(a)
    move(b)
    with torch.no_grad():
        wanted = kin.logits(model, kin.batch())
        one = effective(a) + effective(b)
        a.detach()
        b.detach()
        composed = as_delta(one).delta
        composed.merge()
        close(kin.logits(model, kin.batch()), wanted)
        composed.unmerge()
    composed.detach()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_what_is_taken_away_is_unlearnt() -> None:
    """A small change that lowers a loss raises it when it is taken away."""
    kin = FAMILIES["llama"]
    model, batch = kin.build(), kin.batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    delta = api.attach(model, "lora(rank=2) + bitfit(at='norm')")
    optimiser = torch.optim.SGD(delta.parameters(), lr=0.05)
    for _ in range(5):
        optimiser.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimiser.step()

    @torch.no_grad()
    def loss() -> float:
        return float(model(**batch, labels=labels).loss)

    learnt, moved = loss(), effective(delta)
    delta.detach()
    base = loss()
    as_delta(-moved)
    assert learnt < base - 1e-3 and loss() > base + 1e-3


def test_a_quantised_base_takes_part() -> None:
    """On int8 the change is one of the numbers that the weights stand for."""
    model = load_backbone("t5-nano", quantise="int8").model
    a = api.attach(model, "dora(rank=2, at='encoder.attention.q')")
    b = api.attach(model, "lora(rank=2, at='encoder.attention.q')", seed=1)
    move(a)
    move(b, 1)
    one = effective(b)
    both = effective(a) + one
    wanted = {name: value.clone() for name, value in both.items()}
    a.detach()
    b.detach()
    for each in (one, both):
        composed = as_delta(each)
        assert composed.error < 1e-6
        composed.delta.detach()
    found = effective(as_delta(both).delta)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_cut_of_full_fine_tuning() -> None:
    model = FAMILIES["t5"].build()
    full = api.attach(model, "full")
    move(full)
    one = effective(full)
    full.detach()
    whole, cut = as_delta(one), as_delta(one, rank=2)
    assert whole.error == 0 and 0 < cut.error < 1
    assert cut.delta.bank.numel < whole.delta.bank.numel
    found = effective(whole.delta)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in one.items())


def test_one_leaf_cannot_be_two_things() -> None:
    model = FAMILIES["t5"].build()
    names = {"shared.weight", "lm_head.weight"}
    assert names <= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shape = model.get_parameter("shared.weight").shape
    parts: dict[str, Tensor | Product] = {
        name: torch.full(shape, float(k)) + torch.randn(shape) for k, name in enumerate(names)
    }
    with pytest.raises(UnsupportedError, match="is tied to a parameter"):
        as_delta(Change(model, parts))
    assert not api.deltas_of(model)


def test_dropped_entries_have_no_rank_and_stay_dense() -> None:
    composed = as_delta(dare(change(2), rate=0.5))
    assert {method.name for method in composed.delta.expression} == {"difference"}
    composed.delta.detach()


def test_what_cannot_be_attached_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="rank must be at least 1"):
        as_delta(change(1), rank=0)
    with pytest.raises(ConfigurationError, match="names no parameter"):
        as_delta(Change(MODEL, {}))
    with pytest.raises(ConfigurationError):
        as_delta(add([change(1)], [1.0, 2.0]))
