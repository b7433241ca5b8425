"""Steps at test time: undone bit for bit, downhill, towards the activations of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from deltatune import api
from deltatune.core.adapting import Adaptation, adapting, strayed, survey_activations
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, StateError, TrainingError, UnsupportedError
from deltatune.testing.case import Case, close, marks, move
from deltatune.testing.families import FAMILIES

ROBUST = "robust_prefix(length=3, share=0.8)"


def everything(delta: Delta) -> dict[str, Tensor]:
    return {f"{k}/{n}": v.clone() for k in range(delta.slots) for n, v in delta.tensors(k).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trained(family: str) -> tuple[Any, Delta, dict[str, Tensor]]:
    """A model with a robust prefix that has seen 32 rows of three token ids as its training."""
    model = FAMILIES[family].build().requires_grad_(False)
    delta = api.attach(model, ROBUST)
    move(delta)
    batches = []
    for seed in range(4):
        batch = FAMILIES[family].batch(rows=8, seed=seed)
        batch["input_ids"] = batch["input_ids"] % 3 + 5
        batches.append(batch)
    kept = survey_activations(delta, batches, correct=lambda output, batch: torch.ones(8).bool())
    assert kept == 32
    return model, delta, batches[0]


def perturbed(family: str) -> dict[str, Tensor]:
    return FAMILIES[family].batch(rows=4, seed=9)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_perturbed_text_comes_nearer_to_the_activations_of_training(family: str) -> None:
    model, delta, plain = trained(family)
    before, batch = everything(delta), perturbed(family)

    def far(rows: dict[str, Tensor]) -> float:
        return float(strayed(delta, lambda: model(**rows)).detach()) / len(rows["input_ids"])

    with torch.no_grad():
        expected = FAMILIES[family].logits(model, batch)
        assert far(batch) > far(plain)
        start = far(batch)
        with adapting(delta, learning_rate=0.01) as adaptation:
            assert adaptation.take(0, lambda: strayed(delta, lambda: model(**batch))) == []
            assert torch.equal(FAMILIES[family].logits(model, batch), expected)
            losses = adaptation.take(5, lambda: strayed(delta, lambda: model(**batch)))
            assert losses[0] / 4 == pytest.approx(start) and losses[-1] < losses[0]
            assert far(batch) < start
            assert not torch.equal(FAMILIES[family].logits(model, batch), expected)
        assert torch.equal(FAMILIES[family].logits(model, batch), expected)
    assert same(everything(delta), before)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_what_is_surveyed_and_measured(family: str, left: bool) -> None:
    """The projections are those of an SVD of the rows that were right, in float64 numpy."""
    kin = FAMILIES[family]
    model: Any = kin.build().requires_grad_(False).double()
    delta = api.attach(model, ROBUST)
    move(delta)
    inner = model.encoder if family == "t5" else getattr(model, "bert", model.base_model)
    if family == "bert":
        inner = inner.encoder
    blocks: list[tuple[str, nn.Module]] = [
        (f"{'encoder' if family != 'llama' else 'decoder'}.{n}", block)
        for n, block in enumerate(next(m for m in inner.children() if isinstance(m, nn.ModuleList)))
    ]
    if family == "t5":
        blocks += [(f"decoder.{n}", block) for n, block in enumerate(model.decoder.block)]
    seen: dict[str, Any] = {}

    def hear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            seen[name] = y.detach().numpy()

        return hook

    for name, block in blocks:
        block.register_forward_hook(hear(name))
    batch = kin.batch(rows=12, left=left)
    right = torch.arange(12) % 3 > 0
    assert survey_activations(delta, [batch], correct=lambda o, b: right) == 8
    held = {name.removeprefix("robust_prefix/"): v for name, v in delta.tensors().items()}
    mask = batch["attention_mask"].numpy()
    states, total = {}, 0.0
    for name, y in seen.items():
        if family == "llama":
            last = [int(np.flatnonzero(row)[-1]) for row in mask]
            states[name] = y[np.arange(12), last]
        elif name.startswith("decoder"):
            states[name] = y[:, 0]
        else:
            states[name] = (y * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        _, lengths, axes = np.linalg.svd(states[name][right.numpy()])
        shares = np.cumsum(lengths**2) / np.sum(lengths**2)
        count = int(np.argmax(shares >= 0.8)) + 1
        assert 0 < count < 8
        Q = axes[:count].T @ axes[:count]
        np.testing.assert_allclose(held[f"{name}/Q"].double().numpy(), Q, atol=1e-5)
        total += float((states[name] - states[name] @ Q).__pow__(2).sum())
    found = strayed(delta, lambda: model(**batch))
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)


def test_rows_that_were_answered_correctly() -> None:
    model = FAMILIES["bert"].build().requires_grad_(False)
    delta = api.attach(model, f"{ROBUST} + head(labels=3)")
    move(delta)
    batch = FAMILIES["bert"].batch(rows=8)
    answers = model(**batch).logits.argmax(-1)
    labels = torch.where(torch.arange(8) < 5, answers, (answers + 1) % 3)
    assert survey_activations(delta, [{**batch, "labels": labels}]) == 5
    with pytest.raises(TrainingError, match="No row was answered correctly"):
        survey_activations(delta, [{**batch, "labels": (answers + 1) % 3}])
    with pytest.raises(ConfigurationError, match="labels of classes or tokens"):
        survey_activations(delta, [batch])
    for family, shift in (("t5", 0), ("llama", 1)):
        kin = FAMILIES[family]
        model = kin.build().requires_grad_(False)
        delta, batch = api.attach(model, ROBUST), kin.batch(rows=4)
        said = model(**batch).logits.argmax(-1)
        labels = torch.full_like(batch["input_ids"] if shift else said, -100)
        labels[:, 2:4] = said[:, 2 - shift : 4 - shift]
        labels[0, 3] += 1
        assert survey_activations(delta, [{**batch, "labels": labels}]) == 3


def test_a_survey_is_stored_and_acts_again(tmp_path: Path) -> None:
    model, delta, _ = trained("llama")
    batch = perturbed("llama")
    expected = strayed(delta, lambda: model(**batch))
    folder = api.save(delta, tmp_path / "delta")
    delta.detach()
    again = api.load(folder, model)
    assert torch.equal(strayed(again, lambda: model(**batch)), expected)


def test_before_its_survey_nothing_strays() -> None:
    with Case(ROBUST, "llama").attached() as (model, delta):
        batch = perturbed("llama")
        assert float(strayed(delta, lambda: model(**batch)).detach()) == 0
        before = marks(model)
        strayed(delta, lambda: model(**batch))
        assert marks(model) == before


def test_any_method_adapts_to_a_loss_of_the_callers_own() -> None:
    """Entropy of the answers: downhill in one slot, the other slots and all marks left alone."""
    case = Case("lora(rank=2) + bitfit", "bert")
    with case.attached(slots=3) as (model, delta):
        delta.freeze(1)
        delta.bank.slots[1].grad = kept = torch.ones_like(delta.bank.slots[1])
        before, noted, batch = everything(delta), marks(model), case.kin.batch()

        def entropy() -> Tensor:
            p = case.kin.logits(model, batch).softmax(-1)
            return -(p * p.log()).sum(-1).mean()

        with adapting(delta, slot=1, learning_rate=0.01) as adaptation:
            losses = adaptation.take(3, entropy) + adaptation.take(3, entropy)
            assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
            inside = everything(delta)
            assert {n for n in before if not torch.equal(before[n], inside[n])} == {
                name for name in before if name.startswith("1/")
            }
        assert same(everything(delta), before) and marks(model) == noted
        assert delta.is_frozen(1) and not delta.is_frozen(0)
        assert delta.bank.slots[1].grad is kept and delta.bank.slots[0].grad is None


class _Steered(LogitsProcessor):
    """Tunes biases before every token, so that one token becomes less likely (UDDIA)."""

    def __init__(self, model: Any, adaptation: Adaptation, steps: int, avoided: int) -> None:
        self.model, self.adaptation = model, adaptation
        self.steps, self.avoided = steps, avoided
        self.said: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        def ahead() -> Tensor:
            made: Tensor = self.model(input_ids=input_ids).logits[:, -1].log_softmax(-1)
            return made

        self.adaptation.take(self.steps, lambda: ahead()[:, self.avoided].exp().sum())
        scores = ahead()
        self.said.append(float(scores[:, self.avoided].exp().sum()))
        return scores


def test_biases_are_tuned_while_a_text_is_generated() -> None:
    kin = FAMILIES["llama"]
    model: Any = kin.build().requires_grad_(False)
    ids = kin.batch(rows=2)["input_ids"][:, :4]
    fixed: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    base = model.generate(ids, **fixed)
    avoided = int(base[0, 4])
    delta = api.attach(model, "uddia")
    before, state = everything(delta), {k: v.clone() for k, v in model.state_dict().items()}
    found = {}
    for steps in (0, 3):
        with adapting(delta, learning_rate=0.05) as adaptation:
            steered = _Steered(model, adaptation, steps, avoided)
            made = model.generate(ids, logits_processor=LogitsProcessorList([steered]), **fixed)
        found[steps] = made, steered.said
        assert same(everything(delta), before) and same(dict(model.state_dict()), state)
        assert torch.equal(model.generate(ids, **fixed), base)
    assert torch.equal(found[0][0], base) and found[3][1][0] < found[0][1][0]
    assert avoided not in found[3][0][0, 4:]


def test_what_fails_on_the_way_is_undone() -> None:
    case = Case("bitfit", "llama")
    with case.attached() as (model, delta):
        before, batch = everything(delta), case.kin.batch()

        def loss() -> Tensor:
            return case.kin.logits(model, batch).square().mean()

        def twice() -> None:
            with adapting(delta, learning_rate=0.1) as adaptation:
                adaptation.take(2, loss)
                assert not same(everything(delta), before)
                adaptation.take(1, lambda: loss() * torch.inf)

        with pytest.raises(TrainingError, match="has a loss of inf"):
            twice()
        assert same(everything(delta), before)
        with adapting(delta, learning_rate=0.1) as adaptation:
            for wrong in (
                lambda: loss().detach(),
                lambda: case.kin.logits(model, batch),
                lambda: torch.ones((), requires_grad=True),
            ):
                with pytest.raises(ConfigurationError, match=r"one number|does not depend"):
                    adaptation.take(1, wrong)


def enter(delta: Delta, slot: int = 0) -> None:
    with adapting(delta, learning_rate=0.1, slot=slot):
        pass


def test_what_cannot_adapt_is_refused() -> None:
    case = Case("lora(rank=2)", "llama")
    with case.attached() as (model, delta):
        with pytest.raises(ConfigurationError, match="There is no slot 1"):
            enter(delta, 1)
        with pytest.raises(ConfigurationError, match="Use robust_prefix"):
            strayed(delta, lambda: case.logits(model))
        with torch.inference_mode(), pytest.raises(StateError, match="no_grad"):
            enter(delta)
        model.train()
        with pytest.raises(StateError, match="in evaluation"):
            enter(delta)
        model.train(False)
        delta.merge()
        with pytest.raises(StateError, match="not merged"):
            enter(delta)
        delta.unmerge()
        delta.detach()
        with pytest.raises(StateError, match="attached"):
            enter(delta)
        with pytest.raises(StateError, match="control"):
            enter(api.attach(model, "full"))


def test_what_cannot_be_measured_is_refused() -> None:
    with Case(f"{ROBUST} + prompt(length=2)", "llama").attached() as (model, delta):
        with pytest.raises(StateError, match="called no block"):
            strayed(delta, lambda: None)
        with pytest.raises(UnsupportedError, match="other tokens than the text"):
            strayed(delta, lambda: model(**perturbed("llama")))
        assert not any(chain.unused for chain in delta.host.chains)
    with pytest.raises(ConfigurationError, match=r"share in \(0, 1\]"):
        api.plan(FAMILIES["llama"].build(), "robust_prefix(share=0.0)")


def test_zero_steps_are_the_plain_prefix() -> None:
    kin = FAMILIES["llama"]
    model, delta, _ = trained("llama")
    batch = perturbed("llama")
    with adapting(delta, learning_rate=1.0) as adaptation:
        adaptation.take(0, lambda: torch.zeros(()))
        found = kin.logits(model, batch)
    held = {name: value for name, value in delta.tensors().items() if not name.endswith("/Q")}
    delta.detach()
    plain = api.attach(model, "prefix(length=3)")
    plain.bank.write(0, {name.replace("robust_", ""): value for name, value in held.items()})
    close(kin.logits(model, batch), found)
