"""The effective change of a delta is what merging writes, less what stood there."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune import api
from deltatune.composition import Change, add, effective
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

FOLDING = (
    "lora(rank=3)",
    "rslora(rank=2, at='block.linear')",
    "lora(rank=2) + lora(rank=3, alpha=5.0)",
    "dora(rank=3)",
    "hira(rank=3)",
    "loha(rank=2)",
    "oft(block=4)",
    "ia3",
    "shira(rank=2)",
    "ln_tuning",
    "last_layer",
    "bitfit(create=False)",
    "difference(at='ffn')",
    "lora(rank=3) + bitfit(create=False)",
    "lora(rank=3, at='attention') + dora(rank=2, at='attention') + last_layer",
)


def build(family: str) -> PreTrainedModel:
    """In fp64, so that what merging writes is known to more digits than fp32 has."""
    return FAMILIES[family].build().double()


def merged_change(model: nn.Module, delta: Delta, slot: int = 0) -> dict[str, Tensor]:
    """What the weights are after merging, less what they were."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    delta.merge(slot)
    change = {name: value - before[name] for name, value in model.named_parameters()}
    delta.unmerge()
    return {name: value for name, value in change.items() if value.any()}


def same(change: Change, wanted: dict[str, Tensor]) -> None:
    assert {name for name, value in change.items() if value.abs().max() > 1e-9} == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(change[name].double(), value.double(), rtol=1e-5, atol=1e-7)
        assert change[name].dtype is torch.float32


@pytest.mark.parametrize(("method", "family"), list(product(FOLDING, ("bert", "gpt2"))))
def test_it_is_what_merging_writes(method: str, family: str) -> None:
    model = build(family)
    delta = api.attach(model, method)
    move(delta)
    same(effective(delta), merged_change(model, delta))


def test_it_is_of_the_frozen_weights_whatever_is_attached_or_merged() -> None:
    model = build("bert")
    other = api.attach(model, "lora(rank=2)")
    delta = api.attach(model, "dora(rank=2)", slots=2)
    move(other)
    move(delta)
    wanted = effective(delta, 1)
    other.merge()
    delta.merge(1)
    same(effective(delta, 1), dict(wanted))
    delta.unmerge()
    other.unmerge()
    other.detach()
    delta.detach()
    same(effective(delta, 1), dict(wanted))
    fresh = api.attach(model, "dora(rank=2)", slots=2)
    for slot in (0, 1):
        fresh.bank.write(slot, delta.tensors(slot))
    same(wanted, merged_change(model, fresh, 1))


def test_full_fine_tuning_has_one_with_tied_names() -> None:
    model = FAMILIES["t5"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta = api.attach(model, "full")
    move(delta)
    found = effective(delta)
    assert set(found) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.named_parameters(remove_duplicate=False):
        assert found[name].equal(value.detach() - before[name])
    delta.detach()
    with pytest.raises(StateError, match="Take its change before"):
        effective(delta)


def test_created_biases_are_differences_from_nothing() -> None:
    model = FAMILIES["llama"].build()
    delta = api.attach(model, "bitfit(at='attention.q') + lora(rank=2, at='attention.q')")
    move(delta)
    found = effective(delta)
    leaves = {name.rpartition("/")[0]: v for name, v in delta.tensors().items() if "bitfit" in name}
    for key, value in leaves.items():
        assert found[f"{key.partition('/')[2]}.bias"].equal(value)
    assert all(name.endswith(("q_proj.weight", "q_proj.bias")) for name in found)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("adapter(bottleneck=4)", "adapter, a part .* acts on activations .* soup"),
        ("prefix(length=2)", "prefix"),
        ("prompt(length=2)", "prompt"),
        ("lora(rank=2) + adapter(bottleneck=4)", r"methods=\['lora'\]"),
        ("lora(rank=2) + head(labels=2)", "head, .* replaces the classifier"),
    ],
)
def test_what_does_not_fold_is_refused_by_name(method: str, said: str) -> None:
    model = FAMILIES["bert"].build()
    delta = api.attach(model, method)
    with pytest.raises(UnsupportedError, match=said):
        effective(delta)


def test_a_part_can_be_taken_alone() -> None:
    model = FAMILIES["bert"].build()
    both = api.attach(model, "lora(rank=2) + adapter(bottleneck=4)")
    move(both)
    alone = api.attach(model, "lora(rank=2)")
    alone.bank.write(0, both.tensors())
    found, wanted = effective(both, methods=["lora"]), effective(alone)
    assert set(found) == set(wanted) and all(found[name].equal(wanted[name]) for name in wanted)
    with pytest.raises(UnknownNameError, match="lara"):
        effective(both, methods=["lara"])
    with pytest.raises(ConfigurationError, match="no slot 1"):
        effective(both, 1)


def test_products_are_kept_as_factors() -> None:
    model = FAMILIES["bert"].build()
    delta = api.attach(model, "lora(rank=2, at='block.linear') + bitfit(at='block.linear')")
    move(delta)
    change = effective(delta)
    assert "Change(" in repr(change)
    kept = sum(
        part.numel() if isinstance(part, Tensor) else part.numel for part in change.parts.values()
    )
    assert kept == delta.bank.numel


def test_changes_of_two_models_have_no_sum(tmp_path: Path) -> None:
    one, two = FAMILIES["bert"].build(), FAMILIES["bert"].build()
    first = api.attach(one, "lora(rank=2)")
    move(first)
    a, b = effective(first), effective(api.attach(two, "lora(rank=2)"))
    with pytest.raises(ConfigurationError, match="onto one model"):
        a - b
    second = api.load(api.save(first, tmp_path / "a"), one)
    assert all(value.abs().max() < 1e-7 for value in (a - effective(second)).values())
    with pytest.raises(ConfigurationError, match="at least one"):
        add([])
    with pytest.raises(ConfigurationError, match="2 terms need as many"):
        add([a, a], [1.0])
