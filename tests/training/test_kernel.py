"""The loop, a bare loop and transformers' Trainer on the real kernel, over tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.standin import quick
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deltatune import api
from deltatune.core.run import Run
from deltatune.testing.families import FAMILIES
from deltatune.training import Result, Steps, fit

CASES = [
    ("t5", "lora(rank=2, dropout=0.2)"),
    ("t5", "prompt(length=3) + bitfit"),
    ("bert", "adapter(bottleneck=4)"),
    ("gpt2", "prefix(length=3)"),
    ("gpt2", "full"),
    ("bert", "adalora(rank=3, final_rank=1, every=2)"),
    ("bert", "lt_sft(share=0.1)"),
    ("t5", "diff_pruning(share=0.1, turn=0.5)"),
]
PLAIN = [("t5", "lora(rank=2)"), ("bert", "adapter(bottleneck=4)")]


def rows_for(family: str, count: int = 20) -> list[dict[str, list[int]]]:
    """Rows of the family's batches, with the labels that its form of model takes."""
    batch = FAMILIES[family].batch(count)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if family == "bert":
        labels = ids[:, 0] % 3
    elif family == "gpt2":
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100
    else:
        labels = ids[:, :3].clone()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: held[row].tolist() for name, held in columns.items()} for row in range(count)]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def a_run(family: str, method: str) -> tuple[PreTrainedModel, Run]:
    model = FAMILIES[family].build()
    return model, Run(api.attach(model, method, seed=1))


def trained(run: Run, family: str, folder: Path | None = None, steps: int = 12) -> Result:
    return fit(
        run,
        rows_for(family),
        collate,
        settings=quick(schedule="constant"),
        budget=Steps(steps),
        folder=folder,
    )


@pytest.mark.parametrize(("family", "method"), CASES)
def test_fit_trains_and_goes_on_with_the_same_bits(
    family: str, method: str, tmp_path: Path
) -> None:
    _, run = a_run(family, method)
    base = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    result = trained(run, family)
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    if method != "full":
        assert all(torch.equal(base[name], p) for name, p in run.model.named_parameters())

    class Interrupted(Exception):
        """Ends a run from within."""

    class Interrupting(Run):
        def set_step(self, step: int) -> None:
            if step == 8:
                raise Interrupted
            super().set_step(step)

    with pytest.raises(Interrupted):
        trained(
            Interrupting(api.attach(FAMILIES[family].build(), method, seed=1)), family, tmp_path
        )
    _, resumed = a_run(family, method)
    assert trained(resumed, family, tmp_path).losses == result.losses
    expected = run.trainable_state()
    for name, tensor in resumed.trainable_state().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("family", "method"), PLAIN)
def test_a_bare_loop_trains_the_same(family: str, method: str) -> None:
    """Full batches without clipping: the loop in ten lines gives what `fit` gives."""
    rows = rows_for(family, 8)
    _, ours = a_run(family, method)
    settings = quick(per_device_batch_size=8, max_norm=None, schedule="constant")
    result = fit(ours, rows, collate, settings=settings, budget=Steps(6))

    model, run = a_run(family, method)
    optimiser = torch.optim.AdamW(run.delta.parameters(), lr=0.02, weight_decay=0.0)
    batch, losses = collate(rows), []
    for _ in range(6):
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses == pytest.approx(list(result.losses), rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("family", "method"), PLAIN)
def test_transformers_trainer_trains_a_run(family: str, method: str, tmp_path: Path) -> None:
    _, run = a_run(family, method)
    base = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    before = run.trainable_state()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=10,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,  # a run takes whatever its model takes
    )
    trainer = Trainer(run, arguments, collate, rows_for(family))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(torch.equal(base[name], p) for name, p in run.model.named_parameters())
    assert not any(torch.equal(before[name], held) for name, held in run.trainable_state().items())
