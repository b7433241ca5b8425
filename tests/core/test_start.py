"""One slot begins with what another delta has learned, or is refused and stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ArtefactError,
    BackboneMismatchError,
    ConfigurationError,
    StateError,
)
from deltatune.core.start import fill_expert, start_from
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["bert"]
METHODS = [
    "prompt(length=3)",
    "lora(rank=2)",
    "adapter(bottleneck=4)",
    "vera(rank=4)",
    "prefix(length=2) + bitfit",
    "p_tuning(length=3, middle=4)",
]


def trained(method: str, seed: int = 3, slots: int = 1) -> Delta:
    delta = api.attach(KIN.build(), method, seed=seed, slots=slots)
    move(delta, seed)
    return delta


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_slot_computes_what_its_source_computes(method: str) -> None:
    source = trained(method, slots=2)
    delta = api.attach(KIN.build(), method, slots=3)
    kept = delta.tensors(0)
    start_from(delta, source, slot=2, source_slot=1)
    with source.route([1] * 4), delta.route([2] * 4):
        expected, found = (KIN.logits(d.model, KIN.batch()) for d in (source, delta))
    assert torch.equal(found, expected)
    assert same(delta.tensors(0), kept) and not same(delta.tensors(2), kept)


@pytest.mark.parametrize("method", [one for one in METHODS if "p_tuning" not in one])
def test_a_folder_starts_what_it_was_saved_from(method: str, tmp_path: Path) -> None:
    source = trained(method)
    folder = api.save(source, tmp_path / "delta")
    delta = api.attach(KIN.build(), method, slots=2)
    start_from(delta, folder, slot=1)
    assert same(delta.tensors(1), source.tensors()) and delta.saved == {}


def test_a_prompt_starts_from_the_tokens_that_another_method_makes(tmp_path: Path) -> None:
    source = trained("p_tuning(length=3, middle=4)")
    tokens = source.parts[0].method.collapse(source.parts[0].sites[0], _own(source))["P"]
    for given in (source, api.save(source, tmp_path / "delta")):
        delta = api.attach(KIN.build(), "prompt(length=3)")
        start_from(delta, given)
        assert torch.equal(delta.tensors()["prompt/encoder/P"], tokens)
        delta.detach()


def _own(delta: Delta) -> dict[str, Tensor]:
    return {name.rpartition("/")[2]: value for name, value in delta.tensors().items()}


def test_a_head_stays_the_task_s_own(tmp_path: Path) -> None:
    source = trained("prompt(length=3) + head(labels=2)")
    for given in (source, api.save(source, tmp_path / "delta")):
        delta = api.attach(KIN.build(), "head(labels=3) + prompt(length=3)")
        before = delta.tensors()
        start_from(delta, given)
        after, wanted = delta.tensors(), source.tensors()
        assert torch.equal(after["prompt/encoder/P"], wanted["prompt/encoder/P"])
        assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("head"))
        delta.detach()


def test_dropout_may_differ_and_scale_may_not() -> None:
    source = trained("lora(rank=2, alpha=4.0)")
    start_from(api.attach(KIN.build(), "lora(rank=2, alpha=4.0, dropout=0.1)"), source)
    with pytest.raises(ConfigurationError, match="cannot start from lora"):
        start_from(api.attach(KIN.build(), "lora(rank=2, alpha=8.0)"), source)


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("prompt(length=3)", "prompt(length=2)"),
        ("p_tuning(length=3, middle=4)", "prompt(length=3)"),
        ("lora(rank=2)", "lora(rank=2, at='attention.k')"),
        ("prompt(length=3)", "prompt(length=3) + lora(rank=2)"),
        ("head(labels=2)", "head(labels=2)"),
        ("lora(rank=2)", "full"),
    ],
)
def test_another_method_is_no_start(method: str, source: str) -> None:
    delta = api.attach(KIN.build(), method)
    before = delta.tensors()
    with pytest.raises(ConfigurationError, match="must have the methods of its source"):
        start_from(delta, api.attach(KIN.build(), source))
    assert same(delta.tensors(), before)


def test_what_has_no_slot_or_no_file_is_refused(tmp_path: Path) -> None:
    delta, source = api.attach(KIN.build(), "lora(rank=2)"), trained("lora(rank=2)")
    with pytest.raises(ConfigurationError, match="slot 1"):
        start_from(delta, source, slot=1)
    with pytest.raises(ConfigurationError, match="slot 1"):
        start_from(delta, source, source_slot=1)
    with pytest.raises(ArtefactError, match="is no delta"):
        start_from(delta, tmp_path / "nothing")
    delta.merge()
    with pytest.raises(StateError, match="Unmerge it"):
        start_from(delta, source)
    with pytest.raises(StateError, match="trains the backbone itself"):
        start_from(api.attach(KIN.build(), "full"), source)


def test_a_folder_of_another_backbone_is_refused(tmp_path: Path) -> None:
    folder = api.save(trained("lora(rank=2)"), tmp_path / "delta")
    model = KIN.build()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(BackboneMismatchError):
        start_from(api.attach(model, "lora(rank=2)"), folder)


# ---- experts


@torch.no_grad()
def test_a_fusion_of_a_trained_adapter_computes_what_that_computes(tmp_path: Path) -> None:
    source = trained("pfeiffer(bottleneck=3, up_std=0.01) + head(labels=2)")
    plain = api.attach(KIN.build(), "pfeiffer(bottleneck=3)")
    plain.bank.write(0, source.tensors())
    expected = KIN.logits(plain.model, KIN.batch())
    for given in (source, api.save(source, tmp_path / "delta")):
        delta = api.attach(KIN.build(), "adapter_fusion(bottleneck=3, experts=1)", slots=2)
        kept = delta.tensors(0)
        fill_expert(delta, given, 0, slot=1)
        assert same(delta.tensors(0), kept)
        with delta.route([1] * 4):
            torch.testing.assert_close(
                KIN.logits(delta.model, KIN.batch()), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("adapter_fusion(bottleneck=3, experts=3)", "pfeiffer(bottleneck=3, up_std=0.01)"),
        ("bitfit + poly(rank=2, experts=3)", "lora(rank=2, dropout=0.1)"),
        ("molora(rank=2, experts=3)", "lora(rank=2)"),
    ],
)
def test_an_expert_is_filled_and_the_others_stay(method: str, source: str) -> None:
    delta, given = api.attach(KIN.build(), method), trained(source)
    before = delta.tensors()
    before = {name: value.clone() for name, value in before.items()}
    fill_expert(delta, given, 1)
    filled = {name.partition("/")[2]: value for name, value in given.tensors().items()}
    for name, value in delta.tensors().items():
        expected = before[name].clone()
        if name.partition("/")[2] in filled:
            expected[1] = filled.pop(name.partition("/")[2])
        assert torch.equal(value, expected), name
    assert not filled


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("adapter_fusion(bottleneck=3)", "pfeiffer(bottleneck=4)"),
        ("adapter_fusion(bottleneck=3)", "pfeiffer(bottleneck=3, activation='tanh')"),
        ("adapter_fusion(bottleneck=3)", "pfeiffer(bottleneck=3, bias=False)"),
        ("adapter_fusion(bottleneck=3)", "adapter(bottleneck=3, activation='relu')"),
        ("adapter_fusion(bottleneck=3)", "pfeiffer(bottleneck=3, at='block[0].ffn')"),
        ("adapter_fusion(bottleneck=3)", "pfeiffer(bottleneck=3) + bitfit"),
        ("poly(rank=2)", "lora(rank=2, alpha=4.0)"),
        ("lora(rank=2)", "lora(rank=2)"),
        ("moelora(rank=2, experts=2)", "lora(rank=2, alpha=32.0)"),
        ("poly(rank=2)", "full"),
    ],
)
def test_what_is_no_expert_is_refused(method: str, source: str) -> None:
    delta = api.attach(KIN.build(), method)
    before = delta.tensors()
    with pytest.raises(ConfigurationError, match="as an expert: it must be one"):
        fill_expert(delta, api.attach(KIN.build(), source), 0)
    assert same(delta.tensors(), before)


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_is_not_there_is_refused(expert: int) -> None:
    delta = api.attach(KIN.build(), "adapter_fusion(bottleneck=3)")
    with pytest.raises(ConfigurationError, match="0 to 3"):
        fill_expert(delta, trained("pfeiffer(bottleneck=3)"), expert)


# ---- prompts that begin as other prompts


def roomy() -> PreTrainedModel:
    """As the family, with positions for prompts of the length of the papers."""
    config: Any = copy.deepcopy(KIN.build().config)
    config.max_position_embeddings = 128
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: Any = BertForSequenceClassification(config)
    made: PreTrainedModel = model.eval().requires_grad_(False)
    return made


def answers(delta: Delta, batch: dict[str, Tensor]) -> Tensor:
    model: Any = delta.model
    return KIN.logits(model, batch)


def fitted(delta: Delta, batch: dict[str, Tensor], labels: Tensor, steps: int) -> list[float]:
    """The losses of a delta that is trained on one batch, before each step."""
    optimiser = torch.optim.AdamW(delta.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(answers(delta, batch), labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_spot_evaluates_as_its_source_before_it_is_trained() -> None:
    """Attached fresh, the prompt is another; transferred, it answers what its source answers."""
    batch = KIN.batch()
    source = api.attach(roomy(), "spot")
    fitted(source, batch, torch.zeros(4, dtype=torch.long), 3)
    expected = answers(source, batch)
    target = api.attach(roomy(), "spot", seed=3)
    assert not torch.equal(answers(target, batch), expected)
    start_from(target, source)
    assert torch.equal(answers(target, batch), expected)
    fitted(target, batch, torch.ones(4, dtype=torch.long), 1)
    assert not same(target.tensors(), source.tensors())


def test_ppt_goes_from_running_text_to_a_task_without_a_loss(tmp_path: Path) -> None:
    """Pairs of halves, real and exchanged, stand for next sentences; their prompt starts the task,
    bit for bit, and a head of the task's own stands beside it.
    """
    follows = KIN.batch(rows=4)
    follows["input_ids"][2:, 3:] = follows["input_ids"][2:, 3:].flip(0)
    pretrained = api.attach(roomy(), "ppt + head(labels=2)")
    losses = fitted(pretrained, follows, torch.tensor([1, 1, 0, 0]), 12)
    assert losses[-1] < losses[0]
    folder = api.save(pretrained, tmp_path / "pretrained")
    delta = api.attach(roomy(), "ppt + head(labels=3)", seed=4)
    start_from(delta, folder)
    name = "prompt/encoder/P"
    assert torch.equal(delta.tensors()[name], pretrained.tensors()[name])
    batch = KIN.batch(seed=2)
    losses = fitted(delta, batch, torch.tensor([0, 1, 2, 0]), 12)
    assert losses[-1] < losses[0]
    assert not torch.equal(delta.tensors()[name], pretrained.tensors()[name])


def test_warp_trains_tokens_and_a_verbaliser() -> None:
    model, batch = KIN.build(), KIN.batch()
    d, outputs = 32, 3
    delta = api.attach(model, "warp")
    assert delta.bank.numel == (20 + outputs) * d + outputs
    torch.autograd.backward(KIN.logits(model, batch)[:, :2].square().sum())
    gradients = delta.bank.gradients(0)
    assert {n.rpartition("/")[2] for n, g in gradients.items() if g.any()} == {
        "P",
        "weight",
        "bias",
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    losses = fitted(delta, batch, torch.tensor([0, 1, 1, 0]), 12)
    assert losses[-1] < losses[0]
    # Without its tokens it is a linear probe of what the classifier reads.
    held = {n: v for n, v in delta.tensors().items() if n.startswith("head/")}
    delta.detach()
    read: list[Tensor] = []
    classifier = model.get_submodule("classifier")
    handle = classifier.register_forward_hook(lambda m, args, output: read.append(args[0]))
    probe = api.attach(model, "head(labels=2)")
    probe.bank.write(0, held)
    with torch.no_grad():
        found = KIN.logits(model, batch)[:, :2]
    handle.remove()
    weight, bias = (
        next(v for n, v in held.items() if n.endswith(f"/{k}")) for k in ("weight", "bias")
    )
    torch.testing.assert_close(found, read[0] @ weight[:2].T + bias[:2])
