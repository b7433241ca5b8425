"""How alike deltas are: against dense arithmetic, and whatever factors a change was trained in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from deltatune import api
from deltatune.composition import effective, nearest, similarity, stored_similarity
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.start import start_from
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["bert"]


def bank(method: str, slots: int = 3, seed: int = 0) -> Delta:
    delta = api.attach(KIN.build(), method, slots=slots)
    move(delta, seed)
    return delta


@pytest.mark.parametrize("method", ["lora(rank=2)", "bitfit", "dora(rank=2)", "loha(rank=2)"])
def test_the_cosine_of_changes_is_that_of_the_dense_ones(method: str) -> None:
    held = bank(method)
    dense = [
        torch.cat([change[name].double().flatten() for name in sorted(change)])
        for change in (effective(held, k) for k in range(2))
    ]
    wanted = float(cosine_similarity(dense[0], dense[1], dim=0))
    assert abs(wanted) > 1e-4 and similarity((held, 0), (held, 1)) == pytest.approx(
        wanted, abs=1e-6
    )
    assert similarity(held, held) == pytest.approx(1, abs=1e-6)


def test_other_factors_of_one_change_are_no_other_change() -> None:
    held = bank("lora(rank=2)")
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) * 3
    leaves = held.tensors(0)
    with torch.no_grad():
        held.bank.write(1, {
            name: turn @ value if name.endswith("/A") else value @ torch.linalg.inv(turn)
            for name, value in leaves.items()
        })  # fmt: skip
    assert similarity((held, 0), (held, 1)) == pytest.approx(1, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_prompts_of_any_lengths_are_compared_by_their_tokens(
    one: int, other: int, pairs: bool
) -> None:
    model = KIN.build()
    first, second = (
        api.attach(model, f"prompt(length={n}) + head(labels=2)") for n in (one, other)
    )
    for seed, delta in enumerate((first, second)):
        move(delta, seed)
    a, b = (
        next(value.double() for name, value in delta.tensors(0).items() if name.endswith("/P"))
        for delta in (first, second)
    )
    each = cosine_similarity(a[:, None], b[None], dim=2).mean()
    wanted = each if pairs else cosine_similarity(a.mean(0), b.mean(0), dim=0)
    assert similarity(first, second, pairs=pairs) == pytest.approx(float(wanted), abs=1e-9)


def test_the_nearest_is_what_a_target_started_from() -> None:
    held = bank("prompt(length=3)", slots=4)
    start_from(held, held, slot=0, source_slot=2)
    (best, cosine), *others = nearest((held, 0), [(held, k) for k in (1, 2, 3)])
    assert best == 1 and cosine == pytest.approx(1) and all(c < 0.9 for _, c in others)
    assert [c for _, c in others] == sorted((c for _, c in others), reverse=True)


def test_what_cannot_be_compared_is_refused() -> None:
    held = bank("prompt(length=3)")
    with pytest.raises(ConfigurationError, match="different models"):
        similarity(held, bank("prompt(length=3)"))
    with pytest.raises(ConfigurationError, match="one is a prompt"):
        similarity(held, api.attach(held.model, "lora(rank=2)"))
    with pytest.raises(ConfigurationError, match="at least one"):
        nearest(held, [])
    with pytest.raises(UnsupportedError, match="acts on activations"):
        adapters = bank("adapter(bottleneck=2)")
        similarity((adapters, 0), (adapters, 1))
    untrained = api.attach(KIN.build(), "lora(rank=2)", slots=2)
    assert similarity((untrained, 0), (untrained, 1)) == 0


@pytest.mark.parametrize("method", ["lora(rank=2) + head(labels=2)", "pissa(rank=2)",
                                    "prompt(length=3)", "p_tuning(length=3)"])  # fmt: skip
def test_folders_are_as_alike_as_what_they_hold(method: str, tmp_path: Path) -> None:
    held = bank(method)
    folders = [api.save(held, tmp_path / str(slot), slot=slot) for slot in range(2)]
    for pairs in (False, True):
        found = stored_similarity(*folders, pairs=pairs)
        assert found == pytest.approx(similarity((held, 0), (held, 1), pairs=pairs), abs=1e-6)


@pytest.mark.parametrize(
    "method", ["dora(rank=2)", "adapter(bottleneck=2)", "bitfit", "lora(rank=2) + pissa(rank=2)"]
)
def test_folders_that_say_too_little_are_as_alike_as_none(method: str, tmp_path: Path) -> None:
    held = bank(method)
    folders = [api.save(held, tmp_path / str(slot), slot=slot) for slot in range(2)]
    assert stored_similarity(*folders) is None


def test_folders_of_different_methods_are_refused(tmp_path: Path) -> None:
    one = api.save(bank("lora(rank=2)"), tmp_path / "one")
    other = api.save(bank("lora(rank=1)"), tmp_path / "other")
    with pytest.raises(ConfigurationError, match="cannot be compared"):
        stored_similarity(one, other)
