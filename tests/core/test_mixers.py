"""Mixers: weights for other methods, from what a site reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.methods.linear_map import INPUTS, OUTPUTS, Tiny
from torch import Tensor
from transformers import PreTrainedModel

from deltatune import api
from deltatune.core.bank import Bank
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, TargetError, UnsupportedError
from deltatune.core.grammar import parse
from deltatune.core.start import fill_expert, start_from
from deltatune.core.text import text_of
from deltatune.methods import Gate, LoRA, Pfeiffer, Route
from deltatune.testing.case import Case, close, move
from deltatune.testing.families import FAMILIES

ADDING = ("lora(rank=2)", "pfeiffer(bottleneck=3)", "prefix(length=2)", "bitfit")


def written(delta: Delta, **leaves: float | Tensor) -> None:
    """Sets leaves by the last part of their names."""
    with torch.no_grad():
        for name, place in delta.bank.read(0).items():
            if name.rpartition("/")[2] in leaves:
                value = torch.as_tensor(leaves[name.rpartition("/")[2]], dtype=place.dtype)
                place.copy_(value.expand_as(place))


@contextmanager
def on(family: str, method: str) -> Iterator[tuple[PreTrainedModel, Delta]]:
    model = FAMILIES[family].build()
    model.train(False)
    delta = api.attach(model, method)
    move(delta)
    yield model, delta


def copied(source: Delta, to: Delta) -> None:
    """Gives the leaves of one delta to the other, which names them alike."""
    held = to.tensors()
    to.bank.write(0, held | {n: v for n, v in source.tensors().items() if n in held})


# ---- the language


@pytest.mark.parametrize(
    "text",
    [
        "gate(lora(rank=4), pfeiffer)",
        "0.5 * route(lora(rank=2), 0.25 * lora(rank=3), chosen=1) + bitfit",
        "bitfit >> fuse(lora, pfeiffer, frozen=True) + prefix >> lora",
        "gate(prefix(length=3), tokenwise=True)",
    ],
)
def test_a_mixture_reads_as_it_is_written(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


def test_python_writes_the_same_as_the_text() -> None:
    made = Route(chosen=1).over(LoRA(rank=2), "pfeiffer") + "bitfit"
    assert made == parse("route(lora(rank=2), pfeiffer, chosen=1) + bitfit")
    assert -0.5 * made == parse("-0.5 * route(lora(rank=2), pfeiffer, chosen=1) - 0.5 * bitfit")
    assert parse("lora - gate(bitfit)") == parse("lora + -1.0 * gate(bitfit)")
    assert made.at("ffn.up") == parse(
        "route(lora(rank=2, at='ffn.up'), pfeiffer(at='ffn.up'), chosen=1) + bitfit(at='ffn.up')"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gate", "gate weighs other methods; found none"),
        ("gate()", "found none"),
        ("gate(lora + bitfit)", r"is a sum.*gate\(lora, bitfit\)"),
        ("gate(lora >> bitfit)", "'>>' stands within"),
        ("gate(mam)", r"is a sum.*gate\(prefix\(length=30\), parallel"),
        ("gate(route(lora))", "route within gate"),
        ("gate(prompt)", "cannot weigh prompt"),
        ("route(full)", "cannot weigh full"),
        ("fuse(prefix)", "fuse weighs by what its members make of a site, and prefix"),
        ("0.5 * gate(prefix)", "at the strength 1"),
        ("route(lora, lora, chosen=3)", "chosen lies in 0 to 2"),
        ("gate(lora, at='ffn')", "gate acts where its members act"),
        ("gate(lora, members=1)", "argument of gate 'members'"),
        ("lora(bitfit)", "is not a method"),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_written(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        parse(text)


def test_ids_weigh_nothing_and_a_mixture_is_not_merged() -> None:
    with pytest.raises(TargetError, match="reads ids"):
        api.plan(FAMILIES["t5"].build(), "gate(lora, trainable_tokens(tokens='3, 4'))")
    delta = api.attach(FAMILIES["bert"].build(), "gate(lora(rank=2))")
    with pytest.raises(UnsupportedError, match="gate acts on activations"):
        delta.merge()


# ---- gates


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_open_gates_are_the_sum_and_closed_ones_the_backbone(family: str) -> None:
    case = Case(f"gate({', '.join(ADDING)})", family)
    bare = case.logits(case.model())
    with on(family, " + ".join(ADDING)) as (model, plain):
        expected = case.logits(model)
    with on(family, case.method) as (model, delta):
        copied(plain, delta)
        written(delta, W=0.0, b=200.0)
        close(case.logits(model), expected)
        written(delta, b=-200.0)
        close(case.logits(model), bare)


def test_a_gate_is_the_mean_over_the_text_or_each_token_s_own() -> None:
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(1)).double()
    model = Tiny().double()
    delta = api.attach(model, "gate(lora(rank=2, alpha=4.0), tokenwise=True)", at="lin")
    move(delta)
    p = {name.rpartition("/")[2]: value.double() for name, value in delta.tensors().items()}
    W, b = model.lin.weight.detach(), model.lin.bias.detach()
    gates = 1 / (1 + (-(x @ p["W"].mT + p["b"])).exp())
    expected = x @ W.mT + b + gates * (x @ (2.0 * p["B"] @ p["A"]).mT)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)

    batch = FAMILIES["bert"].batch()
    real = batch["attention_mask"].bool()
    assert not real.all()
    seen = []
    with on("bert", "gate(lora(rank=2))") as (bert, delta), torch.no_grad():
        (link, *_) = [k for k in delta.links if k.method.name == "gate"]
        link.site.module.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        written(delta, W=3.0)
        bert(**batch)
        (first, *_) = seen
        text = text_of(batch, delta.host, "gate", causal=False, past=0)
        own = {n: delta.tensors()[full] for n, full in link.names.items()}
        made = link.method.mix(first, None, text, own)
        every = torch.sigmoid(first @ own["W"].mT + own["b"])[..., 0]
        for row in range(len(real)):
            close(made[row, 0, 0], every[row][real[row]].mean())
        assert (made == made[:, :1]).all()


# ---- routers and fusions


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_router_over_loras_is_a_mixture_of_loras(chosen: int) -> None:
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(2))
    ours, theirs = Tiny(), Tiny()
    loras = ", ".join(["lora(rank=2, alpha=4.0)"] * 3)
    mixed = api.attach(ours, f"route({loras}, chosen={chosen})", at="lin")
    known = api.attach(theirs, f"molora(rank=2, experts=3, alpha=4.0, chosen={chosen})", at="lin")
    move(known)
    held = known.tensors()
    own = {"route/lin/R": held["molora/lin/R"]}
    for n, key in enumerate(("lora", "lora.2", "lora.3")):
        own |= {f"{key}/lin/{leaf}": held[f"molora/lin/{leaf}"][n] for leaf in "AB"}
    mixed.bank.write(0, own)
    close(ours(x), theirs(x))


def test_a_fusion_of_adapters_is_adapter_fusion_without_its_values() -> None:
    adapters = ", ".join(["pfeiffer(bottleneck=3)"] * 2)
    case = Case(f"fuse({adapters})", "bert")
    with on("bert", "adapter_fusion(experts=2, bottleneck=3)") as (model, known):
        held = known.tensors()
        held = {n: torch.eye(len(v)) if n.endswith("/V") else v for n, v in held.items()}
        known.bank.write(0, held)
        expected = case.logits(model)
    with on("bert", case.method) as (model, mixed):
        own = mixed.tensors()
        for name in own:
            part, site, leaf = name.split("/")
            value = held[f"adapter_fusion/{site}/{leaf}"]
            own[name] = value if part == "fuse" else value[int(part.endswith(".2"))]
        mixed.bank.write(0, own)
        close(case.logits(model), expected)


def test_one_chosen_member_is_that_member_and_a_strength_weakens_all() -> None:
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(3))
    model = Tiny()
    bare = model(x)
    delta = api.attach(model, "route(lora(rank=2), hira(rank=2), chosen=1)", at="lin")
    move(delta)
    R = torch.stack([torch.ones(INPUTS), -torch.ones(INPUTS)])
    written(delta, R=R)
    found = model(x)
    held = delta.tensors()
    delta.detach()
    alone = []
    for name in ("lora", "hira"):
        one = api.attach(model, f"{name}(rank=2)", at="lin")
        copied_leaves = {n: v for n, v in held.items() if n.startswith(f"{name}/")}
        one.bank.write(0, copied_leaves)
        alone.append(model(x))
        one.detach()
    first = (x.sum(-1, keepdim=True) > 0).expand(-1, -1, OUTPUTS)
    expected = torch.where(first, alone[0], alone[1])
    close(found, expected)
    half = api.attach(model, "0.5 * route(lora(rank=2), hira(rank=2), chosen=1)", at="lin")
    half.bank.write(0, held)
    close(model(x), (bare + expected) / 2)


# ---- members that were trained before


def test_trained_members_are_filled_in_and_stay() -> None:
    sources = []
    for seed, text in enumerate(["lora(rank=2)", "lora(rank=2)", "pfeiffer(bottleneck=3)"]):
        sources.append(api.attach(FAMILIES["bert"].build(), text, seed=seed))
        move(sources[-1], seed)
    model = FAMILIES["bert"].build()
    text = "fuse(lora(rank=2), lora(rank=2), pfeiffer(bottleneck=3), frozen=True)"
    delta = api.attach(model, text)
    for place, source in enumerate(sources):
        fill_expert(delta, source, place)
    held = delta.tensors()
    for key, source in zip(("lora", "lora.2", "pfeiffer"), sources, strict=True):
        for name, value in source.tensors().items():
            assert torch.equal(held[f"{key}/{name.partition('/')[2]}"], value)
    assert isinstance(delta.bank, Bank)
    trained = {name.partition("/")[0] for name in delta.bank.trained}
    assert trained == {"fuse"}
    assert api.plan(model, text).trainable == sum(
        2 * link.site.outputs**2 + link.site.outputs
        for link in delta.links
        if link.method.name == "fuse"
    )
    with pytest.raises(ConfigurationError, match="takes bitfit as an expert"):
        fill_expert(delta, api.attach(FAMILIES["bert"].build(), "bitfit"), 0)
    again = api.attach(FAMILIES["bert"].build(), text)
    start_from(again, delta)
    assert all(torch.equal(again.tensors()[name], value) for name, value in held.items())


def test_members_of_one_site_and_of_several_share_the_weights_of_each_site() -> None:
    model = FAMILIES["bert"].build()
    delta = api.attach(model, Gate().over(LoRA(rank=2), Pfeiffer(bottleneck=3), LoRA(rank=3)))
    counts = {k.site.name: k.site.members for k in delta.links if k.method.name == "gate"}
    assert {count for name, count in counts.items() if name.endswith(("query", "value"))} == {2}
    assert {count for name, count in counts.items() if name.endswith("ffn")} == {1}


# ---- a first pass


def test_x_lora_weighs_by_what_the_backbone_makes_of_the_text() -> None:
    batch = FAMILIES["bert"].batch()
    method = "x_lora(lora(rank=2), hira(rank=2))"
    with on("bert", method) as (model, delta), torch.no_grad():
        with delta.active(False):
            hidden = model.base_model(**batch).last_hidden_state
        seen: list[Tensor] = []
        link = next(k for k in delta.links if k.method.name == "x_lora")
        p = {name: delta.tensors()[full] for name, full in link.names.items()}
        assert {full.split("/")[1] for full in delta.tensors() if full.startswith("x_lora/")} == {
            "encoder, 2 members"
        }
        mix = type(link.method).mix

        def watched(self: object, *args: object) -> Tensor:
            seen.append(mix(self, *args))  # type: ignore[arg-type]
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(link.method), "mix", watched)
            model(**batch)
        assert len(seen) == len([k for k in delta.links if k.method.name == "x_lora"])
        expected = (hidden @ p["W"].mT + p["b"]).softmax(-1)
        for weights in seen:
            close(weights, expected)


def test_x_lora_needs_the_width_of_what_it_reads() -> None:
    with pytest.raises(TargetError, match="names no hidden_size"):
        api.attach(Tiny(), "x_lora(lora(rank=2, at='lin'), lora(rank=3, at='lin'))")
