"""Packing and cutting by tokens: what every row gives, and every step, stays what it was."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.standin import StandIn, make_rows, quick
from tests.training.standin import collate as collate_standin
from tests.training.test_many import (
    SEEDS,
    alone,
    bank_for,
    collate,
    function,
    jobs_for,
    results,
    rows_for,
    same,
)
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from deltatune import api
from deltatune.backbones.sentence import POOLINGS, SentenceClassifier
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.run import Run
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES
from deltatune.training import Steps, fit
from deltatune.training.losses import inputs_without_loss, row_losses
from deltatune.training.many import Job, fit_many
from deltatune.training.packing import Packing

CPU = torch.device("cpu")
SEVERAL = "lora(rank=2) + adapter(bottleneck=4) + bitfit + prefix(length=2)"
METHODS = ("lora(rank=2)", "adapter(bottleneck=4)", "bitfit", "prefix(length=2)", SEVERAL)
SENTENCES = tuple(f"sentence {pooling}" for pooling in POOLINGS)
LENGTHS = st.lists(st.integers(1, 24), min_size=2, max_size=7)


def built(family: str) -> PreTrainedModel:
    """A model of a family, or of "sentence " and a pooling."""
    if family in FAMILIES:
        return FAMILIES[family].build()
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=97, initializer_range=0.2, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, problem_type="single_label_classification",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return SentenceClassifier(BertModel(config).eval(), family.partition(" ")[2])


def rows_of(family: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of these lengths with the labels that the family takes."""
    random = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        ids = torch.randint(2, 97, (length,), generator=random).tolist()
        labels: Any = [*ids[:3], 1] if family.startswith("t5") else ids[0] % 3
        if family in FAMILIES and FAMILIES[family].decoder_only:
            labels = [-100, *ids[1:]]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@functools.cache
def ready(family: str, method: str) -> tuple[Delta, Packing]:
    """A model with a delta that is no identity, and how it is packed."""
    delta = api.attach(built(family), method)
    move(delta)
    return delta, Packing.of(Run(delta), rows_of(family, [9, 9, 3]), collate, CPU)


def losses_and_gradient(
    delta: Delta, batch: Mapping[str, Tensor], packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """[rows], the loss of each row, and the gradient of their sum."""
    with nullcontext() if packing is None else packing.on():
        logits = delta.model(**inputs_without_loss(delta.model, batch)).logits
    each = row_losses(delta.model, logits, batch["labels"])
    parameters = list(delta.parameters())
    found = torch.autograd.grad(each.sum(), parameters, allow_unused=True)
    gradients = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]
    return each, torch.cat([gradient.flatten() for gradient in gradients])


CASES = [(family, METHODS[0]) for family in (*SENTENCES, "roberta", "mistral", "gemma3", "mixtral")]
CASES += [("bert", method) for method in METHODS]
CASES += [(family, METHODS[-1]) for family in ("gpt2", "llama", "t5")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_row_gives_what_it_gives_unpacked(family: str, method: str) -> None:
    delta, packing = ready(family, method)

    @settings(max_examples=6, deadline=None)
    @given(LENGTHS)
    def check(lengths: list[int]) -> None:
        batch = collate(rows_of(family, lengths))
        each, gradient = losses_and_gradient(delta, batch)
        packed, packed_gradient = losses_and_gradient(delta, batch, packing)
        torch.testing.assert_close(packed, each, rtol=1e-5, atol=1e-5)
        assert (packed_gradient - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6

    check()


def test_fewer_tokens_are_computed_and_nothing_stays_behind() -> None:
    delta, packing = ready("bert", METHODS[0])
    batch = collate(rows_of("bert", [24, 3, 5, 4, 6]))
    seen: list[tuple[int, ...]] = []
    words = delta.model.bert.embeddings.word_embeddings  # type: ignore[union-attr]
    watching = words.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))  # type: ignore[operator, union-attr]
    before = [chain.module for chain in delta.host.chains]
    with packing.on():
        delta.model(**batch)
    delta.model(**batch)
    watching.remove()
    assert seen == [(1, 42), (5, 24)]
    assert [chain.module for chain in delta.host.chains] == before


def test_what_cannot_gain_is_left_as_it_is() -> None:
    """Bits are equal: rows that fill the width, and a batch without a mask."""
    delta, packing = ready("gpt2", METHODS[0])
    ids = FAMILIES["gpt2"].batch(3)["input_ids"].repeat(1, 5)
    for batch in ({"input_ids": ids}, {"input_ids": ids[:1], "attention_mask": ids[:1] // ids[:1]}):
        expected = delta.model(**batch).logits
        with packing.on():
            assert torch.equal(delta.model(**batch).logits, expected)


def test_checkpointed_blocks_find_their_rows_again() -> None:
    delta, packing = ready("bert", METHODS[0])
    batch = collate(rows_of("bert", [7, 3, 5]))
    _, expected = losses_and_gradient(delta, batch)
    delta.model.activation_checkpointing_enable()  # type: ignore[operator]
    delta.model.train()
    try:
        _, gradient = losses_and_gradient(delta, batch, packing)
    finally:
        delta.model.eval()
        delta.model.activation_checkpointing_disable()  # type: ignore[operator]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method"), [("bert", SEVERAL), ("llama", METHODS[0]), ("t5", METHODS[0])]
)
@pytest.mark.parametrize("changed", [{"tokens_per_pass": 14}, {"packing": True}])
def test_a_run_ends_as_it_would_in_padded_batches(
    family: str, method: str, changed: dict[str, Any]
) -> None:
    job = jobs_for(family, max_norm=None)[0]
    expected, logits = alone(family, method, job, SEEDS[0])
    other = Job(job.rows, job.settings.model_copy(update=changed), job.budget)
    result, found = alone(family, method, other, SEEDS[0])
    same(result.losses, expected.losses)
    assert (result.steps, result.rows, result.tokens) == (
        expected.steps,
        expected.rows,
        expected.tokens,
    )
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "tokens", "family"),
    [
        (f"{SEVERAL} + last_layer", 20, "bert"),
        ("lora(rank=2)", 4000, "llama"),
    ],
)
def test_packed_runs_that_share_a_base_end_as_alone(method: str, tokens: int, family: str) -> None:
    bank, jobs = bank_for(family, method), jobs_for(family, packing=True)
    found = results(fit_many(bank, jobs, collate, tokens=tokens))
    for slot, (job, seed, result) in enumerate(zip(jobs_for(family), SEEDS, found, strict=True)):
        expected, logits = alone(family, method, job, seed)
        same(result.losses, expected.losses)
        assert result.tokens == expected.tokens
        torch.testing.assert_close(function(bank, family, slot), logits, rtol=1e-3, atol=1e-4)


def test_an_interrupted_packed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    class Interrupted(Exception):
        """Ends a run from within."""

    class Interrupting(Run):
        def set_step(self, step: int) -> None:
            if step == 14:
                raise Interrupted
            super().set_step(step)

    def trained(kind: type[Run], folder: Path | None) -> tuple[tuple[float, ...], list[Tensor]]:
        run = kind(api.attach(built("bert"), "lora(rank=2, dropout=0.3)", seed=1))
        packed = quick(packing=True, tokens_per_pass=14, base_dropout=False)
        rows = rows_for("bert", 3)
        result = fit(run, rows, collate, settings=packed, budget=Steps(12), folder=folder)
        return result.losses, list(run.trainable_state().values())

    losses, whole = trained(Run, None)
    with pytest.raises(Interrupted):
        trained(Interrupting, tmp_path)
    again, resumed = trained(Run, tmp_path)
    assert again == losses and all(map(torch.equal, resumed, whole))


@pytest.mark.parametrize(
    ("family", "method", "said"),
    [
        ("bert", "lora(rank=2) + prompt(length=2)", "prompt puts tokens in front.*use prefix"),
        ("bert", "tiny_attention", "tiny_attention reads the text of every row"),
        ("bart", "lora(rank=2)", "BartEncoder counts its positions itself"),
        ("deberta_v2", "lora(rank=2)", "DebertaV2Model cannot be packed"),
        ("gpt_oss", "lora(rank=2)", "GptOssModel cannot be packed"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_training(
    family: str, method: str, said: str
) -> None:
    run = Run(api.attach(built(family), method))
    chains = len(run.delta.host.chains)
    with pytest.raises(UnsupportedError, match=said):
        fit(
            run,
            rows_of(family, [3, 9, 5]),
            collate,
            settings=quick(packing=True),
            budget=Steps(1),
        )
    assert len(run.delta.host.chains) == chains


def test_copies_of_a_row_do_not_hide_that_rows_mix() -> None:
    """A row among its copies attends to itself alone, whatever the mask."""
    delta = api.attach(built("bert"), METHODS[0])
    rows = rows_of("bert", [9]) * 3 + rows_of("bert", [8])
    assert not Packing.of(Run(delta), rows, collate, CPU).causal


def test_what_is_no_run_or_has_no_mask_is_refused() -> None:
    packed = quick(packing=True)
    with pytest.raises(UnsupportedError, match="found StandIn"):
        fit(StandIn(), make_rows(9), collate_standin, settings=packed, budget=Steps(1))

    def without_mask(rows: Sequence[Any]) -> dict[str, Tensor]:
        return {name: held for name, held in collate(rows).items() if name != "attention_mask"}

    run = Run(api.attach(built("bert"), METHODS[0]))
    with pytest.raises(UnsupportedError, match="attention_mask; found input_ids, labels"):
        fit(run, rows_for("bert", 3), without_mask, settings=packed, budget=Steps(1))
    foreign = Run(api.attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), "lora(rank=2, at='0')"))
    with pytest.raises(UnsupportedError, match="Sequential is none"):
        fit(foreign, rows_for("bert", 3), collate, settings=packed, budget=Steps(1))


def test_a_budget_that_a_row_does_not_fit_is_refused() -> None:
    run = Run(api.attach(built("bert"), METHODS[0]))
    with pytest.raises(ConfigurationError, match=r"one pass may have 4.*`tokens_per_pass`"):
        fit(
            run,
            rows_for("bert", 3),
            collate,
            settings=quick(tokens_per_pass=4),
            budget=Steps(1),
        )


def test_runs_that_share_a_base_share_its_passes() -> None:
    bank, jobs = bank_for("bert", METHODS[0]), jobs_for("bert")
    packed = Job(jobs[1].rows, jobs[1].settings.model_copy(update={"packing": True}), Steps(3))
    with pytest.raises(ConfigurationError, match="packed or not"):
        fit_many(bank, [jobs[0], packed], collate)
    with pytest.raises(ConfigurationError, match="give `tokens` for all"):
        fit_many(bank, jobs_for("bert", tokens_per_pass=50), collate)
