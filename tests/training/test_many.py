"""Many runs over one base: each ends as it would alone."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.standin import quick
from torch import Tensor

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError, ConfigurationError, TrainingError
from deltatune.core.run import Run, SlotRun
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES
from deltatune.training import Result, Steps, fit, memory
from deltatune.training.batch import loss_items
from deltatune.training.budget import Budget
from deltatune.training.checkpoint import Checkpoint, Store
from deltatune.training.losses import inputs_without_loss, row_losses
from deltatune.training.many import Job, Outcome, fit_many

METHODS = (
    "lora(rank=2)",
    "adapter(bottleneck=4)",
    "bitfit",
    "last_layer",
    "prompt(length=2)",
    "prefix(length=2)",
    "lora(rank=2) + adapter(bottleneck=4) + prompt(length=2)",
)
SEEDS = (3, 8, 4)
Row = Mapping[str, Any]


def rows_for(family: str, seed: int, count: int = 12) -> list[dict[str, list[int]]]:
    """Rows of 3 to 7 tokens, other ones for every seed, with the labels of the family."""
    batch = FAMILIES[family].batch(count, seed=seed)
    rows = []
    for row in range(count):
        ids = batch["input_ids"][row, : 3 + (row + seed) % 3].tolist()
        labels: Any = ids[0] % 3 if family == "bert" else ids[: 2 + row % 2]
        if family == "llama":
            labels = [-100, -100, *ids[2:]]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows padded to the longest of them, on the right."""

    def padded(name: str, fill: int) -> Tensor:
        longest = max(len(row[name]) for row in rows)
        return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

    ids = padded("input_ids", 0)
    mask = torch.tensor([[int(k < len(r["input_ids"])) for k in range(ids.shape[1])] for r in rows])
    single = not isinstance(rows[0]["labels"], list)
    labels = torch.tensor([r["labels"] for r in rows]) if single else padded("labels", -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def jobs_for(family: str, folder: Path | None = None, **changed: Any) -> list[Job]:
    """Three runs that differ in everything that may differ."""
    return [
        Job(
            rows_for(family, seed),
            quick(
                learning_rate=rate,
                per_device_batch_size=size,
                seed=seed,
                base_dropout=False,
                **changed,
            ),
            budget,
            folder=None if folder is None else folder / str(seed),
        )
        for seed, rate, size, budget in zip(
            SEEDS, (3e-3, 1e-2, 1e-3), (4, 3, 5), (Steps(12), Steps(7), Steps(15)), strict=True
        )
    ]


def bank_for(family: str, method: str, seeds: Sequence[int] = SEEDS) -> Delta:
    return api.attach(FAMILIES[family].build(), method, slots=len(seeds), seed=list(seeds))


def function(delta: Delta, family: str, slot: int) -> Tensor:
    """What a slot computes. Its tensors tell less: what has no effect (a bias of the keys) has a
    gradient of rounding errors, which Adam makes as large as any.
    """
    kin = FAMILIES[family]
    with delta.route([slot]), torch.no_grad():
        return kin.logits(delta.model, kin.batch())  # type: ignore[arg-type]


def alone(family: str, method: str, job: Job, seed: int) -> tuple[Result, Tensor]:
    """The result of a run by itself, and what its delta computes then."""
    delta = bank_for(family, method, [seed])
    result = fit(Run(delta), job.rows, collate, settings=job.settings, budget=job.budget)
    return result, function(delta, family, 0)


def same(mine: Sequence[float], theirs: Sequence[float]) -> None:
    assert len(mine) == len(theirs)
    assert max(abs(one - two) for one, two in zip(mine, theirs, strict=True)) < 1e-5


def results(found: Sequence[Outcome]) -> list[Result]:
    assert all(isinstance(one, Result) for one in found), found
    return [one for one in found if isinstance(one, Result)]


CASES = [(method, 4000, "bert") for method in METHODS]
CASES += [(METHODS[0], 4000, "llama"), (METHODS[-1], 7, "t5"), (METHODS[-1], 7, "llama")]
# These read the text: its padding, and by the labels where a prompt ends.
CASES += [("tiny_attention(heads=2)", 4000, "bert"), ("reft(rank=2)", 4000, "llama")]


@pytest.mark.parametrize(("method", "tokens", "family"), CASES)
def test_each_run_ends_as_it_would_alone(method: str, tokens: int, family: str) -> None:
    bank, jobs = bank_for(family, method), jobs_for(family)
    found = results(fit_many(bank, jobs, collate, tokens=tokens))
    for slot, (job, seed, result) in enumerate(zip(jobs, SEEDS, found, strict=True)):
        expected, logits = alone(family, method, job, seed)
        same(result.losses, expected.losses)
        assert (result.steps, result.rows, result.tokens) == (
            expected.steps,
            expected.rows,
            expected.tokens,
        )
        torch.testing.assert_close(function(bank, family, slot), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart", "bert", "roberta", "llama", "gpt2"])
def test_the_losses_of_the_rows_make_up_the_models_own(family: str) -> None:
    model = FAMILIES[family].build()
    kind = {"bart": "t5", "roberta": "bert", "gpt2": "llama"}.get(family, family)
    batch = collate(rows_for(kind, 1))
    own = model(**batch).loss
    logits = model(**inputs_without_loss(model, batch)).logits
    each, items = row_losses(model, logits, batch["labels"]), loss_items(batch["labels"])
    torch.testing.assert_close(each.sum() / items.sum(), own)
    assert each.shape == items.shape == (12,)


def test_values_are_a_loss_too() -> None:
    model = FAMILIES["bert"].build()
    model.config.num_labels, model.config.problem_type = 1, "regression"
    model.num_labels, model.classifier = 1, torch.nn.Linear(32, 1)
    batch = collate(rows_for("bert", 1))
    batch["labels"] = batch["labels"].float()
    logits = model(**inputs_without_loss(model, batch)).logits
    torch.testing.assert_close(
        row_losses(model, logits, batch["labels"]).mean(), model(**batch).loss
    )


def test_a_slot_is_a_run_by_itself() -> None:
    bank, jobs = bank_for("bert", "lora(rank=2)"), jobs_for("bert")
    others = {name: value.clone() for name, value in bank.tensors(0).items()}
    job = jobs[1]
    result = fit(SlotRun(bank, 1), job.rows, collate, settings=job.settings, budget=job.budget)
    expected, logits = alone("bert", "lora(rank=2)", job, SEEDS[1])
    same(result.losses, expected.losses)
    torch.testing.assert_close(function(bank, "bert", 1), logits, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, others[name]) for name, value in bank.tensors(0).items())


def test_who_trains_next_has_draws_of_dropout_of_its_own() -> None:
    bank, jobs = bank_for("bert", "lora(rank=2, dropout=0.5)", SEEDS[:2]), jobs_for("bert")
    results(fit_many(bank, jobs[:2], collate))
    kin = FAMILIES["bert"]
    bank.train()
    with bank.route([0, 0, 1, 1]):
        first, second = (kin.logits(bank.model, kin.batch()) for _ in range(2))  # type: ignore[arg-type]
    assert not torch.equal(first[:2], second[:2]) and not torch.equal(first[2:], second[2:])


def test_a_run_that_diverges_stops_alone() -> None:
    bank, jobs = bank_for("bert", "lora(rank=2)"), jobs_for("bert")
    wild = jobs[1].settings.model_copy(update={"learning_rate": 1e38, "max_norm": None})
    found = fit_many(bank, [jobs[0], Job(jobs[1].rows, wild, Steps(7)), jobs[2]], collate)
    assert isinstance(found[1], TrainingError) and "not finite" in str(found[1])
    for slot in (0, 2):
        expected, logits = alone("bert", "lora(rank=2)", jobs[slot], SEEDS[slot])
        same(results([found[slot]])[0].losses, expected.losses)
        torch.testing.assert_close(function(bank, "bert", slot), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora(rank=2)", METHODS[-1]])
def test_a_run_that_ends_gives_its_slot_to_the_next(method: str) -> None:
    jobs = [replace(job, seed=seed) for job, seed in zip(jobs_for("bert"), SEEDS, strict=True)]
    jobs = [*jobs, replace(jobs[0], seed=21), replace(jobs[1], seed=3)]
    bank, kept = bank_for("bert", method, (77, 78)), {}

    def ended(number: int, slot: int, outcome: Outcome) -> None:
        kept[number] = function(bank, "bert", slot)

    found = results(fit_many(bank, jobs, collate, tokens=4000, ended=ended))
    assert sorted(kept) == [0, 1, 2, 3, 4] and list(kept) != sorted(kept)
    for number, job in enumerate(jobs):
        expected, logits = alone("bert", method, job, job.seed or 0)
        same(found[number].losses, expected.losses)
        torch.testing.assert_close(kept[number], logits, rtol=1e-3, atol=1e-4)


def test_the_seed_of_a_job_keys_its_dropout() -> None:
    jobs = [replace(job, seed=seed) for job, seed in zip(jobs_for("bert"), SEEDS, strict=True)]
    found = results(fit_many(bank_for("bert", "lora(rank=2, dropout=0.5)", [9]), jobs, collate))
    for job, result in zip(jobs, found, strict=True):
        bank = bank_for("bert", "lora(rank=2, dropout=0.5)", [job.seed or 0])
        expected = results(fit_many(bank, [replace(job, seed=None)], collate))[0]
        assert result.losses == expected.losses


def test_seconds_are_shares_of_the_time_of_all() -> None:
    bank, jobs = bank_for("bert", "lora(rank=2)"), jobs_for("bert")
    started = time.perf_counter()
    found = results(fit_many(bank, jobs, collate))
    assert sum(result.seconds for result in found) <= time.perf_counter() - started
    assert all(result.seconds > 0 for result in found)


def test_an_error_before_training_is_that_of_its_run(tmp_path: Path) -> None:
    bank, jobs = bank_for("bert", "lora(rank=2)"), jobs_for("bert", tmp_path)
    fit_many(bank, jobs, collate)
    (tmp_path / str(SEEDS[1]) / "checkpoint.safetensors").write_bytes(b"broken")
    found = fit_many(bank, jobs, collate)
    assert isinstance(found[1], ArtefactError)
    results([found[0], found[2]])


def test_interrupted_runs_go_on(tmp_path: Path) -> None:
    jobs = jobs_for("bert", tmp_path, checkpoint_every=3, evaluation_every=5)
    calls: list[int] = []

    def validate() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return {"score": 1.0}

    def validated(budget: Budget, job: Job) -> Job:
        return Job(job.rows, job.settings, budget, validate, "score", job.folder)

    held = [validated(job.budget, job) for job in jobs]
    with pytest.raises(KeyboardInterrupt):
        fit_many(bank_for("bert", "lora(rank=2)"), held, collate)
    found = results(fit_many(bank_for("bert", "lora(rank=2)"), held, collate))
    whole = results(fit_many(bank_for("bert", "lora(rank=2)"), jobs_for("bert"), collate))
    assert [one.losses for one in found] == [one.losses for one in whole]
    again = results(fit_many(bank_for("bert", "lora(rank=2)"), held, collate))
    assert [one.losses for one in again] == [one.losses for one in found]  # nothing is run again


@pytest.mark.parametrize("cut", range(1, 16))
def test_runs_that_were_cut_off_anywhere_end_in_the_same_bits(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill falls before a checkpoint is written, and those of the others may be there."""
    whole, bank = bank_for("bert", "lora(rank=2)"), bank_for("bert", "lora(rank=2)")
    expected = results(fit_many(whole, jobs_for("bert"), collate))
    jobs = jobs_for("bert", tmp_path, checkpoint_every=3)
    written, write = itertools.count(1), Store.write

    def killed(store: Store, checkpoint: Checkpoint) -> None:
        if next(written) == cut:
            raise KeyboardInterrupt
        write(store, checkpoint)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "write", killed)
        fit_many(bank_for("bert", "lora(rank=2)"), jobs, collate)
    found = results(fit_many(bank, jobs, collate))
    assert [one.losses for one in found] == [one.losses for one in expected]
    for slot in range(len(jobs)):
        mine, theirs = bank.tensors(slot), whole.tensors(slot)
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_validation_sees_the_slot_of_its_run() -> None:
    bank = bank_for("bert", "lora(rank=2)")
    move(bank)
    seen: dict[int, Tensor] = {}
    kin = FAMILIES["bert"]

    def validate(slot: int) -> dict[str, float]:
        with torch.no_grad():
            seen[slot] = kin.logits(bank.model, kin.batch())  # type: ignore[arg-type]
        return {"score": 0.0}

    jobs = [
        Job(job.rows, job.settings, Steps(2), lambda slot=slot: validate(slot), "score")  # type: ignore[misc]
        for slot, job in enumerate(jobs_for("bert"))
    ]
    fit_many(bank, jobs, collate)
    for slot, logits in seen.items():
        assert torch.equal(function(bank, "bert", slot), logits)


def test_what_does_not_fit_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, jobs = bank_for("bert", "lora(rank=2)"), jobs_for("bert")
    with pytest.raises(ConfigurationError, match="slots=4"):
        fit_many(bank, [*jobs, jobs[0]], collate)
    with pytest.raises(ConfigurationError, match="no jobs"):
        fit_many(bank, [], collate)
    with pytest.raises(ConfigurationError, match="one pass may have 4"):
        fit_many(bank, jobs, collate, tokens=4)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 16 * bank.bank.numel)
    with pytest.raises(ConfigurationError, match="slots=2 at most"):
        fit_many(bank, jobs, collate)
    monkeypatch.undo()
    mixed = jobs[0].settings.model_copy(update={"precision": "bf16"})
    with pytest.raises(ConfigurationError, match="one precision"):
        fit_many(bank, [jobs[0], Job(jobs[1].rows, mixed, Steps(3))], collate)
    assert math.isfinite(results(fit_many(bank, jobs[:1], collate))[0].losses[0])
