"""Means of leaves: what they must keep, and where they are refused."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from deltatune import api
from deltatune.composition import mera, soup, soup_by_score
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, StateError, UnsupportedError
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["bert"]
ADAPTER = "adapter(bottleneck=4)"


def bank(method: str = ADAPTER, slots: int = 3, seed: int = 0) -> Delta:
    """Deltas of one start that went different ways."""
    delta = api.attach(KIN.build(), method, slots=slots, seed=[seed] * slots)
    move(delta, seed)
    return delta


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(3)), st.lists(st.floats(0, 4), min_size=3, max_size=3))
def test_a_soup_is_the_mean_in_any_order(order: list[int], weights: list[float]) -> None:
    weights[0] += 0.5
    held = bank()
    made = soup([(held, k) for k in order], [weights[k] for k in order])
    for name, value in made.tensors().items():
        wanted = sum(w * held.tensors(k)[name].double() for k, w in enumerate(weights))
        torch.testing.assert_close(value.double(), wanted / sum(weights), rtol=1e-5, atol=1e-6)
    assert all(
        v.equal(held.tensors(1)[n]) for n, v in soup([(held, 1)]).tensors().items()
    )  # one is itself


def test_a_soup_of_prefixes_is_of_what_is_stored(tmp_path: Path) -> None:
    held = bank("prefix(length=2, reparameterise=True, middle=8) + lora(rank=2)", slots=2)
    made = soup([(held, 0), (held, 1)])
    assert str(made.expression) == "prefix(length=2) + lora(rank=2)"
    model = held.model
    loaded = [api.load(api.save(held, tmp_path / str(k), slot=k), model) for k in (0, 1)]
    for name, value in made.tensors().items():
        close(value, (loaded[0].tensors()[name] + loaded[1].tensors()[name]) / 2)


@pytest.mark.parametrize(
    ("one", "two", "error", "said"),
    [
        (ADAPTER, "adapter(bottleneck=5)", ConfigurationError, "deltas of one expression"),
        ("lora(rank=2)", "lora(rank=2)", UnsupportedError, "That one is exact"),
        ("full", "full", UnsupportedError, "That one is exact"),
    ],
)
def test_means_without_meaning_are_refused(
    one: str, two: str, error: type[Exception], said: str
) -> None:
    model = KIN.build()
    first = api.attach(model, one)
    deltas = [first, first if one == "full" else api.attach(model, two)]
    with pytest.raises(error, match=said):
        soup(deltas)
    assert len(api.deltas_of(model)) == len(set(deltas))


def test_leaves_that_are_not_trained_must_agree() -> None:
    model = KIN.build()
    a, b = (api.attach(model, f"{ADAPTER} + shira(rank=2)", seed=seed) for seed in (0, 1))
    with pytest.raises(UnsupportedError, match="places is not trained and differs"):
        soup([a, b])
    assert api.deltas_of(model) == (a, b)


def test_deltas_of_two_models_or_none_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="different models"):
        soup([bank(), bank()])
    with pytest.raises(ConfigurationError, match="at least one delta"):
        soup([])
    with pytest.raises(ConfigurationError, match="no slot 7"):
        soup([(bank(), 7)])


def test_a_soup_by_score_takes_what_helps() -> None:
    """The score is nearness to a point: the mean of members 0 and 2; member 1 is far off."""
    held = bank(slots=3)
    with torch.no_grad():
        held.bank.slots[1].add_(5.0)
    target = (held.bank.slots[0] + held.bank.slots[2]).detach() / 2
    acting: list[bool] = []

    def score(made: Delta) -> float:
        acting.append(held.enabled)
        return -float((made.bank.slots[0].detach() - target).norm())

    found = soup_by_score([(held, k) for k in range(3)], score)
    assert set(found.chosen) == {0, 2} and not any(acting) and held.enabled
    torch.testing.assert_close(found.delta.bank.slots[0].detach(), target)
    assert found.score == pytest.approx(0, abs=1e-4) and len(found.scores) == 3
    alone = soup_by_score([(held, k) for k in range(3)], score, most=1)
    assert alone.chosen == found.chosen[:1] and alone.score == max(found.scores)
    with pytest.raises(ConfigurationError, match="most must be"):
        soup_by_score([held], score, most=0)


def test_a_member_that_is_merged_cannot_rest() -> None:
    model = KIN.build()
    a, b = (api.attach(model, f"{ADAPTER} + lora(rank=2)") for _ in range(2))
    with pytest.raises(RuntimeError, match="broken"):
        soup_by_score([a, b], lambda made: (_ for _ in ()).throw(RuntimeError("broken")))
    assert api.deltas_of(model) == (a, b) and a.enabled
    lora = api.attach(model, "lora(rank=2)")
    a.detach()
    b.detach()
    lora.merge()
    with pytest.raises(StateError, match="Unmerge it first"), _resting(lora):
        pass


def _resting(delta: Delta):  # type: ignore[no-untyped-def]
    from deltatune.composition.members import resting

    return resting([(delta, 0)])


def shuffled(delta: Delta, slot: int, seed: int) -> None:
    """Permutes the hidden units of every adapter of one slot; its function stays as it is."""
    random = torch.Generator().manual_seed(seed)
    values = dict(delta.tensors(slot))
    for name in [name for name in values if name.endswith("/D")]:
        order = torch.randperm(len(values[name]), generator=random)
        stem = name[:-1]
        values[name] = values[name][order]
        values[stem + "c"] = values[stem + "c"][order]
        values[stem + "U"] = values[stem + "U"][:, order]
    delta.bank.write(slot, {name: value.clone() for name, value in values.items()})


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31))
def test_mera_of_permuted_copies_is_the_adapter(seed: int) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    held = bank(slots=3)
    original = held.tensors(0)
    for slot in (1, 2):
        held.bank.write(slot, {name: value.clone() for name, value in original.items()})
        shuffled(held, slot, seed + slot)
    sources = [(held, k) for k in range(3)]
    made = mera(sources)
    for name, value in made.tensors().items():
        torch.testing.assert_close(value, original[name], rtol=1e-6, atol=1e-6)
    plain = soup(sources).tensors()
    assert any(not torch.allclose(plain[name], original[name], atol=1e-3) for name in plain)


def brute(reference: Tensor, other: Tensor) -> float:
    """The least cost of all orders of the units."""
    from itertools import permutations

    costs = torch.cdist(reference.double(), other.double()).square()
    return min(
        float(sum(costs[row, column] for row, column in enumerate(order)))
        for order in permutations(range(len(reference)))
    )


def test_mera_aligns_at_the_least_cost() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    model = KIN.build()
    a, b = (api.attach(model, "pfeiffer(bottleneck=4)", seed=seed) for seed in (0, 1))
    move(a)
    move(b, 1)
    made = mera([a, b])
    for name in [name for name in made.tensors() if name.endswith("/D")]:
        units = [
            torch.cat([d.tensors()[name], d.tensors()[name[:-1] + "c"][:, None]], 1) for d in (a, b)
        ]
        mean = torch.cat([made.tensors()[name], made.tensors()[name[:-1] + "c"][:, None]], 1)
        found = float((2 * mean - 2 * units[0]).double().square().sum())
        assert found == pytest.approx(brute(*units), rel=1e-4)


def test_mera_needs_units() -> None:
    model: PreTrainedModel = KIN.build()
    a, b = (api.attach(model, "prefix(length=2)", seed=seed) for seed in (0, 1))
    with pytest.raises(UnsupportedError, match="mera aligns the hidden units"):
        mera([a, b])
    assert api.deltas_of(model) == (a, b)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    held = bank(slots=2)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"needs scipy.*deltatune\[composition\]"):
        mera([(held, 0), (held, 1)])
