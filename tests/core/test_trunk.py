"""What lies below all deltas is computed apart from what lies above, with the same result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltatune import api
from deltatune.core.chain import Inner
from deltatune.core.delta import Delta
from deltatune.core.errors import StateError, UnsupportedError
from deltatune.core.trunk import Trunk
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

TOP = "lora(rank=2, at='block[1].linear')"
PLACES = {  # (family, method): where the boundary lies
    ("bert", TOP): "bert.encoder.layer.1",
    ("bert", "head(labels=2)"): "classifier",
    ("gpt2", "adapter(bottleneck=2, at='block[1].ffn')"): "transformer.h.1",
    ("llama", f"{TOP} + head(labels=3)"): "model.layers.1",
    ("llama", "prefix(length=2, at='block[1].attention')"): "model.layers.1",
    ("t5", "last_layer"): "encoder.block.1",
    ("t5", "bitfit(at='decoder.norm') + lora(rank=2, at='decoder.attention.q')"): "decoder",
    ("bart", "lora(rank=2, at='encoder.block[1].attention.q')"): "model.encoder.layers.1",
}


class Both:
    """Computes what the boundary reads, takes out what is about padding, goes on from there."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk, self.calls = trunk, 0

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = self.trunk.reach(inner, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and states.dim() > 2:
            states = states * mask[..., None]
        self.calls += 1
        return self.trunk.above(inner, kwargs, states)


def attached(model: Any, method: str) -> Delta:
    delta = api.attach(model, method, seed=1)
    move(delta)
    return delta


def padded(family: str, lengths: Sequence[int], left: bool, seed: int) -> dict[str, Tensor]:
    kin = FAMILIES[family]
    batch = kin.batch(len(lengths), seed=seed)
    columns, counts = torch.arange(7), torch.tensor(lengths)[:, None]
    mask = (columns >= 7 - counts if left else columns < counts).long()
    return {**batch, "attention_mask": mask, "input_ids": batch["input_ids"] * mask}


def gradients(delta: Delta, family: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = FAMILIES[family].logits(delta.model, batch)  # type: ignore[arg-type]
    delta.zero_grad()
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    return logits.detach(), torch.cat([row.grad.flatten() for row in delta.bank.slots])  # type: ignore[union-attr]


@settings(deadline=None, max_examples=40)
@given(
    case=st.sampled_from(sorted(PLACES)),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_equals_the_whole_model(
    case: tuple[str, str], lengths: list[int], left: bool, seed: int
) -> None:
    family, method = case
    delta = attached(FAMILIES[family].build(), method)
    batch = padded(family, lengths, left and FAMILIES[family].decoder_only, seed)
    logits, gradient = gradients(delta, family, batch)
    trunk = Trunk(delta.model)
    both = Both(trunk)
    with trunk.installed(both):
        found, slope = gradients(delta, family, batch)
    assert both.calls == 1
    assert trunk.boundary == PLACES[case]
    torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [TOP, "head(labels=3)"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_trunk(family: str, method: str) -> None:
    kin = FAMILIES[family]
    model, batch = kin.build(), kin.batch()
    delta = attached(model, method)
    expected, trunk = kin.logits(model, batch), Trunk(model)
    both = Both(trunk)
    with trunk.installed(both):
        torch.testing.assert_close(kin.logits(model, batch), expected, rtol=1e-6, atol=1e-6)
    assert both.calls == 1
    assert 0 < trunk.share <= 1
    assert torch.equal(kin.logits(model, batch), expected)
    delta.detach()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_trained_lowest_counts() -> None:
    model = FAMILIES["bert"].build()
    upper = attached(model, TOP)
    assert Trunk(model).below == ["bert.encoder.layer.0"]
    lower = attached(model, "bitfit(at='block[0].norm')")
    assert Trunk(model).below == []
    with lower.active(False):
        assert Trunk(model).below == ["bert.encoder.layer.0"]
    lower.detach()
    for method in ("prompt(length=2)", "bitfit(at='bert.embeddings.LayerNorm')"):
        bottom = attached(model, method)
        assert Trunk(model).below == []
        bottom.detach()
    upper.merge()
    with pytest.raises(StateError, match="no delta acts"):
        Trunk(model)


def test_what_the_states_depend_on_is_known() -> None:
    def weights(change: str = "", method: str = TOP) -> dict[str, str]:
        model = FAMILIES["bert"].build()
        if change:
            with torch.no_grad():
                model.get_parameter(change).view(-1)[0] += 1
        attached(model, method)
        return Trunk(model).identity()

    assert weights() == weights()
    assert (
        weights()
        == weights("classifier.weight")
        == weights("bert.encoder.layer.1.output.dense.bias")
    )
    assert weights() != weights("bert.encoder.layer.0.output.dense.bias")
    assert weights() != weights("bert.embeddings.word_embeddings.weight")
    assert weights() != weights(method="head(labels=2)")
    head = weights(method="head(labels=2)")
    assert head != weights("bert.pooler.dense.weight", "head(labels=2)")
    assert head == weights("classifier.weight", "head(labels=2)")


@pytest.mark.filterwarnings("ignore:.*was drawn at random")
def test_what_is_no_fixed_function_is_refused() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(StateError, match="no delta acts"):
        Trunk(model)
    control = api.attach(model, "full")
    with pytest.raises(UnsupportedError, match="backbone itself is trained"):
        Trunk(model)
    control.detach()
    attached(model, TOP)
    model.get_parameter("bert.pooler.dense.bias").requires_grad_(True)
    with pytest.raises(UnsupportedError, match="backbone itself is trained"):
        Trunk(model)
    model.requires_grad_(False)
    block: Any = model.get_submodule("bert.encoder.layer.0")
    block.gradient_checkpointing = True
    with pytest.raises(UnsupportedError, match="Switch it off"):
        Trunk(model)
    block.gradient_checkpointing = False
    model._compiled_call_impl = model._call_impl  # as `model.compile()` does
    with pytest.raises(UnsupportedError, match="compiled"):
        Trunk(model)


def test_a_delta_that_acts_earlier_than_it_stands_is_refused() -> None:
    """DeBERTa's norm of relative positions stands after the blocks and is called before."""
    kin = FAMILIES["deberta_v2"]
    for method, told in (
        (f"{TOP} + bitfit(at='deberta.encoder.LayerNorm')", "acts in LayerNorm before"),
        ("bitfit(at='deberta.encoder.LayerNorm')", "called after deberta.encoder.LayerNorm"),
    ):
        model = kin.build()
        attached(model, method)
        trunk = Trunk(model)
        with trunk.installed(Both(trunk)), pytest.raises(UnsupportedError, match=told):
            kin.logits(model, kin.batch())


def test_a_delta_that_is_switched_on_the_way_is_refused() -> None:
    kin = FAMILIES["bert"]
    model = kin.build()
    attached(model, "head(labels=2)")
    lower = attached(model, TOP)
    with lower.active(False):
        trunk = Trunk(model)
    with trunk.installed(Both(trunk)), pytest.raises(StateError, match="switched"):
        kin.logits(model, kin.batch())


class Odd(nn.Module):
    """Two blocks and a head, called in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embedding = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        if self.way != "never":
            x = self.head(x)
        return SimpleNamespace(logits=self.head(x) if self.way == "twice" else x)


@pytest.mark.parametrize(("way", "told"), [("never", "no part"), ("twice", "several times")])
def test_a_boundary_is_called_once(way: str, told: str) -> None:
    model = Odd(way)
    attached(model, "lora(rank=2, at='head')")
    trunk = Trunk(model)
    with trunk.installed(Both(trunk)), pytest.raises(UnsupportedError, match=told):
        model(input_ids=torch.ones(2, 3, dtype=torch.long))
