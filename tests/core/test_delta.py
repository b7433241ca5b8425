"""A delta's life on a model: attached, switched, merged, routed, detached."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltatune import api
from deltatune.core.attaching import attach
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import (
    ConfigurationError,
    DeltatuneError,
    StateError,
    TargetError,
    UnsupportedError,
)
from deltatune.core.grammar import parse
from deltatune.core.host import host_of
from deltatune.core.run import Run
from deltatune.testing.case import close, marks, move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["llama"]
MANY = ("lora", "adapter(bottleneck=4)", "bitfit", "prefix(length=2)", "prompt(length=2)")


def test_deltas_detach_in_any_order() -> None:
    for order in itertools.islice(itertools.permutations(range(len(MANY))), 0, None, 17):
        model = KIN.build()
        before, logits = marks(model), KIN.logits(model, KIN.batch())
        held = [api.attach(model, method, seed=k) for k, method in enumerate(MANY)]
        for delta in held:
            move(delta)
        for index in order:
            held[index].detach()
            left = [delta for delta in held if delta.attached]
            assert list(deltas_of(model)) == left
        assert marks(model) == before and host_of(model) is None
        assert torch.equal(KIN.logits(model, KIN.batch()), logits)


def test_active_switches_and_remembers() -> None:
    model = KIN.build()
    base = KIN.logits(model, KIN.batch())
    delta = api.attach(model, "lora")
    move(delta)
    on = KIN.logits(model, KIN.batch())
    with delta.active(False):
        assert torch.equal(KIN.logits(model, KIN.batch()), base)
        with delta.active():
            assert torch.equal(KIN.logits(model, KIN.batch()), on)
        assert torch.equal(KIN.logits(model, KIN.batch()), base)
    with pytest.raises(KeyError), delta.active(False):
        raise KeyError
    assert torch.equal(KIN.logits(model, KIN.batch()), on)


def test_merges_follow_the_order_of_attachment() -> None:
    model = KIN.build()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = api.attach(model, "lora"), api.attach(model, "lora(rank=2)", seed=1)
    for delta in (one, two):
        move(delta)
    both = KIN.logits(model, KIN.batch())
    with pytest.raises(StateError, match="Merge lora first"):
        two.merge()
    one.merge()
    with pytest.raises(StateError, match="merged already"):
        one.merge()
    two.merge()
    close(KIN.logits(model, KIN.batch()), both)
    with pytest.raises(StateError, match="it was merged later"):
        one.unmerge()
    with pytest.raises(StateError, match="Call unmerge"):
        one.detach()
    two.unmerge()
    one.unmerge()
    with pytest.raises(StateError, match="not merged"):
        one.unmerge()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert torch.equal(KIN.logits(model, KIN.batch()), both)


@pytest.mark.parametrize(
    ("family", "method", "why"),
    [
        ("llama", "adapter", "acts on activations"),
        ("llama", "prefix", "acts on activations"),
        ("llama", "bitfit", "has no bias"),
        ("gpt2", "last_layer(at='head')", "tied to another module"),
        ("llama", "lora + prompt", "acts on activations"),
        ("llama", "full", "acts on|nothing"),
    ],
)
def test_what_cannot_be_merged_says_why_and_changes_nothing(
    family: str, method: str, why: str
) -> None:
    model = FAMILIES[family].build()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    delta = api.attach(model, method)
    if method == "full":  # it is merged from the start: there is nothing to write
        delta.merge()
        delta.unmerge()
    else:
        with pytest.raises(UnsupportedError, match=why):
            delta.merge()
        assert not delta.merged
    delta.detach()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_a_detached_delta_does_nothing_more() -> None:
    delta = api.attach(KIN.build(), "lora")
    delta.detach()
    for act in (delta.detach, delta.merge):
        with pytest.raises(StateError, match="not attached"):
            act()


def test_a_site_that_is_never_called_is_refused_at_the_first_batch() -> None:
    kin = FAMILIES["deberta_v2"]  # it reads the weight of this module without calling it
    run = Run(api.attach(kin.build(), "last_layer(at='rel_embeddings')"))
    with pytest.raises(StateError, match=r"never called by this model, deberta.encoder.rel_emb"):
        run(**kin.batch())
    alive = Run(api.attach(kin.build(), "last_layer(at='embedding')"))
    alive(**kin.batch())


def test_a_control_stands_alone() -> None:
    model = KIN.build()
    for crowded in ("full + lora", "full + full"):
        with pytest.raises(StateError, match="stands alone"):
            api.attach(model, crowded)
    with pytest.raises(StateError, match="stands alone"):
        api.attach(model, "full", slots=2)
    delta = api.attach(model, "full")
    with pytest.raises(StateError, match=r"attached: full"):
        api.attach(model, "lora")
    with pytest.raises(StateError, match="cannot be switched off"), delta.active(False):
        pass


@pytest.mark.parametrize(
    "wrong", ["lora(at='nothing_here')", "lora + head(labels=1000)", "bitfit(create=False)"]
)
def test_what_cannot_be_attached_leaves_no_trace(wrong: str) -> None:
    model = KIN.build()
    before = marks(model)
    with pytest.raises(DeltatuneError):
        api.attach(model, wrong)
    assert marks(model) == before and host_of(model) is None


def test_a_failure_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = KIN.build()
    model.config._attn_implementation = "flex_attention"
    before = marks(model)
    with pytest.raises(UnsupportedError, match="flex_attention"):
        api.attach(model, "lora + prefix + prompt")
    assert marks(model) == before
    monkeypatch.setattr(Delta, "install", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        api.attach(model, "lora")
    assert marks(model) == before and host_of(model) is None


def test_slots_of_one_bank_have_one_shape() -> None:
    model = KIN.build()
    with pytest.raises(ConfigurationError, match="one method each of the same shape"):
        api.attach(model, ["lora(rank=2)", "lora(rank=4)"])
    with pytest.raises(ConfigurationError, match="as many seeds"):
        attach(model, parse("lora"), slots=2, seed=[1, 2, 3])
    with pytest.raises(ConfigurationError, match="Give either"):
        api.attach(model, ["lora", "lora"], slots=2)
    bank = api.attach(model, "lora", slots=3, seed=4)
    assert bank.seeds == (4, 5, 6)
    assert torch.equal(bank.bank.slots[2], api.attach(KIN.build(), "lora", seed=6).bank.slots[0])


def test_a_bank_must_be_routed_within_its_slots() -> None:
    model = KIN.build()
    bank = api.attach(model, "lora", slots=2)
    with pytest.raises(StateError, match="2 slots, and the batch is not routed"):
        model(**KIN.batch())
    for wrong in ([2], [-1]):
        with pytest.raises(ConfigurationError, match="There is no slot"), bank.route(wrong):
            pass
    with (
        pytest.raises(ConfigurationError, match="4 rows, the routing of lora 3"),
        bank.route([0, 1, 0]),
    ):
        model(**KIN.batch())


@pytest.mark.parametrize("reentrant", [False, True])
def test_reentrant_checkpoints_lose_no_gradient(reentrant: bool) -> None:
    """Sites inside of blocks and outside of them both get theirs."""
    gradients = []
    for checkpointing in (False, True):
        model = KIN.build()
        delta = api.attach(model, "bitfit(at='norm | ffn.down') + lora(at='head | attention.q')")
        move(delta)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
        KIN.logits(model, KIN.batch()).square().sum().backward()
        assert delta.bank.slots[0].grad is not None
        gradients.append(delta.bank.slots[0].grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "prefix(length=2)", "adapter"])
def test_recomputation_under_another_routing_is_refused(method: str) -> None:
    model = KIN.build()
    bank = api.attach(model, method, slots=2)
    move(bank)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with bank.route([0, 1, 1, None]):
        loss = KIN.logits(model, KIN.batch()).square().sum()
    with pytest.raises(StateError, match="between the forward pass and the backward pass"):
        loss.backward()
    with bank.route([0, 1, 1, None]):
        KIN.logits(model, KIN.batch()).square().sum().backward()


def test_idle_slots_are_left_alone_by_the_optimiser() -> None:
    model = KIN.build()
    bank = api.attach(model, "lora", slots=3)
    optimiser = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.5)
    before = [row.detach().clone() for row in bank.bank.slots]
    with bank.route([0, 2, 2, None]):
        KIN.logits(model, KIN.batch()).square().sum().backward()
    optimiser.step()
    moved = [not torch.equal(row, old) for row, old in zip(bank.bank.slots, before, strict=True)]
    assert moved == [True, False, True]


@pytest.mark.parametrize(("family", "at"), [("gpt2", "embedding"), ("bert", "embedding")])
def test_positions_go_through_the_slots_of_their_rows(family: str, at: str) -> None:
    kin = FAMILIES[family]
    batch = kin.batch()
    model = kin.build()
    bank = api.attach(model, "last_layer", at, slots=2)
    move(bank)
    rows = [1, None, 0, 1]
    with bank.route(rows):
        mixed = kin.logits(model, batch)
    close(mixed[1], kin.logits(kin.build(), batch)[1])
    for slot in (0, 1):
        alone = kin.build()
        api.attach(alone, "last_layer", at).bank.write(0, bank.bank.read(slot))
        mine = [row for row, used in enumerate(rows) if used == slot]
        close(mixed[mine], kin.logits(alone, batch)[mine])


def test_a_table_of_relative_positions_belongs_to_no_row() -> None:
    kin = FAMILIES["t5"]
    model = kin.build()
    bank = api.attach(model, "last_layer(at='encoder.block[0]')", slots=2)
    with bank.route([0, 1, 0, 1]), pytest.raises(UnsupportedError, match="once for all rows"):
        kin.logits(model, kin.batch())
    with bank.route([1] * 4):
        kin.logits(model, kin.batch())


def test_attaching_to_seven_billion_parameters_allocates_the_delta_alone() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000))
    delta = api.attach(model, "lora(rank=8)")
    assert delta.bank.numel == 4_194_304
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {tensor.device.type for tensor in delta.parameters()} == {"cpu"}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real(delta)}
    assert sum(held.values()) == 4 * delta.bank.numel


def real(delta: Delta) -> list[torch.Tensor]:
    """Every tensor with memory of its own that hangs on the delta, its model or its chains."""
    found: list[torch.Tensor] = [*delta.parameters(), *delta.buffers()]
    for module in delta.model.modules():
        found += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return [tensor for tensor in found if not tensor.is_meta]


def test_a_target_without_weights_is_refused() -> None:
    with pytest.raises(TargetError, match="finds nothing to tune"):
        api.attach(KIN.build(), "bitfit(at='type:SiLUActivation')")
