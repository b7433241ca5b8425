"""Selected parameters: differences, values and sparse entries, folded, never trained in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from deltatune import api
from deltatune.core.method import METHODS, Category, Method, register
from deltatune.core.select import Form, Sparse
from deltatune.core.site import Site
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES
from deltatune.testing.methods import Case, Law, laws


@dataclass(frozen=True)
class _Random:
    """Distinct entries, drawn."""

    of: int

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return torch.randperm(self.of, generator=random)[: shape[0]]


@pytest.fixture(autouse=True)
def sparse() -> Iterator[type[Method]]:
    """A method of a test's own: some entries of each weight."""

    @register("sparse_test")
    @dataclass(frozen=True, kw_only=True)
    class SparseTest(Method):
        entries: int = 10

        category: ClassVar[Category] = "specification"
        default_at: ClassVar[str] = "block.linear"
        learning_rate: ClassVar[float] = 1e-3

        def select(self, site: Site) -> Mapping[str, Form]:
            weight = site.parameters["weight"]
            assert weight is not None
            return {"weight": Sparse(self.entries, _Random(weight.numel()))}

    yield SparseTest
    del METHODS._entries["sparse_test"]


# Its class is local, so it has no pickle; and ten entries of a matrix move four logits little.
LEFT_OUT = {"law_copies"}


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("law", [law for law in laws() if law.__name__ not in LEFT_OUT])
def test_the_laws_hold_for_sparse_entries(law: Law, family: str, tmp_path: Path) -> None:
    law(Case("sparse_test(entries=40)", family), tmp_path)


def test_sparse_entries_are_the_only_ones_that_change() -> None:
    model = FAMILIES["llama"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta = api.attach(model, "sparse_test")
    assert delta.bank.numel == 14 * 10
    assert api.plan(FAMILIES["llama"].build(), "sparse_test").stored == 2 * 14 * 10
    move(delta)
    delta.merge()
    changed = {n: int((v != before[n]).sum()) for n, v in model.state_dict().items()}
    assert sum(changed.values()) == 140 and set(changed.values()) == {0, 10}


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_equals_training_the_backbone_itself(family: str) -> None:
    kin = FAMILIES[family]
    with_delta, native = kin.build(), kin.build()
    delta = api.attach(with_delta, "last_layer(at='block[-1]')")
    native.requires_grad_(False)
    for part in delta.parts:
        for site in part.sites:
            native.get_submodule(site.path).requires_grad_(True)
    kin.logits(with_delta, kin.batch()).square().sum().backward()
    kin.logits(native, kin.batch()).square().sum().backward()
    gradient = delta.bank.slots[0].grad
    assert gradient is not None
    start = 0
    for name, shape in delta.bank.trained.items():
        _, path, leaf = name.split("/")
        wanted = native.get_submodule(path).get_parameter(leaf).grad
        assert wanted is not None
        torch.testing.assert_close(
            gradient[start : start + wanted.numel()].view(shape), wanted, rtol=1e-3, atol=1e-4
        )
        start += wanted.numel()


@pytest.mark.parametrize("target", ["embedding | head", "embedding", "head", "*"])
def test_a_tied_parameter_is_one_leaf_and_acts_wherever_it_is_used(target: str) -> None:
    kin = FAMILIES["gpt2"]
    model, native = kin.build(), kin.build()
    delta = api.attach(model, f"last_layer(at={target!r})")
    (name,) = [n for n in delta.tensors() if "wte" in n or "lm_head" in n]
    assert {link.site.path for link in delta.links if name in link.names.values()} == {
        "transformer.wte",
        "lm_head",
    }
    with torch.no_grad():
        delta.bank.read(0)[name].mul_(1.5)
        native.transformer.wte.weight.mul_(1.5)
    close(kin.logits(model, kin.batch()), kin.logits(native, kin.batch()))


def test_what_a_tied_module_is_never_called_for_is_not_dead() -> None:
    kin = FAMILIES["t5"]
    model = kin.build()
    delta = api.attach(model, "last_layer(at='*')")
    assert delta.bank.numel == api.plan(model, "last_layer").base
    kin.logits(model, kin.batch())
    assert "shared" in {link.site.path for link in delta.links}
    assert delta.dead_sites() == []


def test_two_differences_and_values_on_one_parameter_add_up() -> None:
    kin = FAMILIES["bert"]
    model = kin.build()
    one = api.attach(model, "bitfit", "ffn.up")
    two = api.attach(model, "last_layer", "ffn.up")
    for k, delta in enumerate((one, two)):
        move(delta, k)
    path = "bert.encoder.layer.0.intermediate.dense"
    base = model.get_parameter(f"{path}.bias").clone()
    difference = one.tensors()[f"bitfit/{path}/bias"]
    values = two.tensors()[f"last_layer/{path}/bias"]
    both = kin.logits(model, kin.batch())
    one.merge()
    close(kin.logits(model, kin.batch()), both)  # values stay a difference to the backbone's own
    two.merge()
    close(kin.logits(model, kin.batch()), both)
    torch.testing.assert_close(model.get_parameter(f"{path}.bias"), difference + values)
    two.unmerge()
    one.unmerge()
    assert torch.equal(model.get_parameter(f"{path}.bias"), base)


def test_values_start_at_the_backbones_own_also_under_a_merged_delta() -> None:
    kin = FAMILIES["llama"]
    model = kin.build()
    lora = api.attach(model, "lora", "attention.q")
    move(lora)
    lora.merge()
    merged = kin.logits(model, kin.batch())
    late = api.attach(model, "last_layer(at='attention.q')")
    close(kin.logits(model, kin.batch()), merged)
    clean = kin.build().get_parameter("model.layers.0.self_attn.q_proj.weight")
    held = late.tensors()["last_layer/model.layers.0.self_attn.q_proj/weight"]
    assert torch.equal(held, clean)
