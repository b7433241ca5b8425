from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.standin import Row, StandIn, accuracy, collate, events, make_rows, quick

from deltatune.core.errors import (
    ArtefactError,
    ConfigurationError,
    TrainingError,
    UnknownNameError,
)
from deltatune.training import Epochs, Seconds, Steps, Tokens, fit

ROWS = make_rows(22)


def test_it_learns() -> None:
    run, rows = StandIn(), make_rows(120)
    before = accuracy(run, rows)
    result = fit(run, rows, collate, settings=quick(), budget=Epochs(12))
    assert accuracy(run, rows) > before + 0.2
    assert result.losses[-1] < result.losses[0]
    assert result.steps == 12 * 30 and result.epochs == 12 and result.rows == 12 * 120
    assert not run.training and result.ending == "budget" and result.kept_step == result.steps
    assert result.peak_memory > 10_000_000 and result.seconds > 0


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    ends = []
    for seed in (1, 1, 2):
        run = StandIn()
        fit(run, ROWS, collate, settings=quick(seed=seed), budget=Steps(7))
        ends.append(run.head.weight.detach().clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@dataclass(frozen=True)
class Several(Row):
    """A row with other right answers."""

    others: tuple[Row, ...] = ()


def test_each_visit_draws_one_of_several_right_answers() -> None:
    several = [Several(row.input_ids, 0, (Row(row.input_ids, 1),)) for row in ROWS]
    seen: list[list[int]] = []

    def collated(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        seen.append([row.labels for row in rows])
        return collate(rows)

    for _ in range(2):
        fit(StandIn(), several, collated, settings=quick(), budget=Epochs(8))
    labels = [label for batch in seen for label in batch]
    half = len(labels) // 2
    assert labels[:half] == labels[half:]  # the same run once more
    assert 0.35 < sum(labels) / len(labels) < 0.65


def test_accumulation_is_one_large_batch_in_parts() -> None:
    """Also for parts of unequal size: 22 rows in steps of 8 leave a last step of 6 = 3 + 3."""
    ends = []
    for size, parts in ((8, 1), (4, 2), (3, 1)):
        run, settings = StandIn(dropout=0.0), quick(per_device_batch_size=size, accumulation=parts)
        result = fit(run, ROWS, collate, settings=settings, budget=Epochs(2))
        ends.append((run.head.weight.detach(), result.losses))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    assert len(ends[2][1]) == 16


def test_every_forward_pass_has_its_own_number() -> None:
    run = StandIn()
    fit(run, ROWS, collate, settings=quick(accumulation=2), budget=Steps(3))
    assert run.steps == list(range(6 - 1 + 1))


def test_bf16_trains_fp32_tensors() -> None:
    run = StandIn()
    result = fit(run, ROWS, collate, settings=quick(precision="bf16"), budget=Steps(20))
    assert run.head.weight.dtype is torch.float32
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("dropout", [True, False])
def test_the_base_drops_out_only_if_asked(dropout: bool) -> None:
    seen = []

    class Watching(StandIn):
        def forward(self, *args: object, **kwargs: object) -> object:
            seen.append((self.training, self.base.training))
            return super().forward(*args, **kwargs)  # type: ignore[arg-type]

    run = Watching()
    settings = quick(base_dropout=dropout, evaluation_every=1)
    fit(run, ROWS, collate, settings=settings, budget=Steps(2), validate=lambda: {"score": 1.0})
    assert seen == [(True, dropout)] * 2


def test_the_bases_dropout_ends_after_so_many_steps_interrupted_or_not(tmp_path: Path) -> None:
    class Watching(StandIn):
        def __init__(self, broken_at: int | None = None) -> None:
            super().__init__()
            self.broken_at, self.seen = broken_at, list[bool]()

        def forward(self, *args: object, **kwargs: object) -> object:
            if len(self.seen) == self.broken_at:
                raise KeyboardInterrupt
            self.seen.append(self.base.training)
            return super().forward(*args, **kwargs)  # type: ignore[arg-type]

    settings = quick(base_dropout_steps=4, evaluation_every=1)

    def trained(run: Watching, folder: Path) -> Watching:
        fit(run, ROWS, collate, settings=settings, budget=Steps(7), folder=folder,
            validate=lambda: {"score": 1.0})  # fmt: skip
        return run

    whole = trained(Watching(), tmp_path / "whole")
    assert whole.seen == [True] * 4 + [False] * 3
    for broken_at in (2, 5):
        folder = tmp_path / str(broken_at)
        with pytest.raises(KeyboardInterrupt):
            trained(Watching(broken_at), folder)
        again = trained(Watching(), folder)
        assert again.seen == whole.seen[-len(again.seen) :]
        assert torch.equal(again.head.weight, whole.head.weight)
    with pytest.raises(ConfigurationError, match="set that too"):
        quick(base_dropout=False, base_dropout_steps=4)


def test_the_callers_random_state_is_untouched() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    fit(StandIn(), ROWS, collate, settings=quick(), budget=Steps(2))
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


def test_how_often_it_is_evaluated_changes_nothing_it_learns() -> None:
    ends = []
    for every in (1, None):
        run = StandIn()

        def validate() -> dict[str, float]:
            return {"score": float(torch.rand(()))}

        settings = quick(evaluation_every=every, keep_best=False)
        fit(run, ROWS, collate, settings=settings, budget=Steps(5), validate=validate)
        ends.append(run.head.weight.detach().clone())
    assert torch.equal(*ends)


def scripted(run: StandIn, scores: list[float], seen: list[torch.Tensor]):  # type: ignore[no-untyped-def]
    """A validation that gives these scores, and notes the tensors it was asked about."""

    def validate() -> dict[str, float]:
        assert not run.training
        seen.append(run.head.weight.detach().clone())
        return {"other": 0.0, "score": scores[len(seen) - 1]}

    return validate


def test_the_best_tensors_are_kept() -> None:
    run, seen = StandIn(), list[torch.Tensor]()
    validate = scripted(run, [0.1, 0.7, 0.7, 0.2], seen)
    settings = quick(evaluation_every=2)
    result = fit(
        run,
        ROWS,
        collate,
        settings=settings,
        budget=Steps(8),
        validate=validate,
        metric="score",
    )
    assert torch.equal(run.head.weight, seen[1])
    assert (result.best_step, result.best_score, result.kept_step) == (4, 0.7, 4)
    assert [point.step for point in result.history] == [2, 4, 6, 8]
    assert [point.scores["score"] for point in result.history] == [0.1, 0.7, 0.7, 0.2]
    seconds = [point.seconds for point in result.history]
    assert seconds == sorted(seconds) and 0 < seconds[0] <= result.seconds


def test_the_last_tensors_are_kept_if_asked() -> None:
    run, seen = StandIn(), list[torch.Tensor]()
    settings = quick(evaluation_every=2, keep_best=False)
    validate = scripted(run, [0.5, 0.1], seen)
    result = fit(
        run, ROWS, collate, settings=settings, budget=Steps(4), validate=validate, metric="score"
    )
    assert torch.equal(run.head.weight, seen[-1])
    assert (result.best_step, result.kept_step) == (2, 4)


def test_patience_stops_a_run() -> None:
    run, seen = StandIn(), list[torch.Tensor]()
    validate = scripted(run, [0.1, 0.5, 0.4, float("nan"), 0.9], seen)
    settings = quick(evaluation_every=3, patience=2)
    result = fit(
        run, ROWS, collate, settings=settings, budget=Steps(90), validate=validate, metric="score"
    )
    assert (result.ending, result.steps, result.best_step) == ("patience", 12, 6)
    assert result.history[-1].scores["score"] is None
    assert torch.equal(run.head.weight, seen[1])


def test_the_first_score_decides_if_no_metric_is_named() -> None:
    result = fit(
        StandIn(),
        ROWS,
        collate,
        settings=quick(),
        budget=Steps(2),
        validate=lambda: {"a": 0.25, "b": 1.0},
    )
    assert result.best_score == 0.25


def test_an_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match=r"'acuracy'.*'accuracy'"):
        fit(
            StandIn(),
            ROWS,
            collate,
            settings=quick(),
            budget=Steps(2),
            validate=lambda: {"accuracy": 1.0},
            metric="acuracy",
        )


def test_budgets_end_a_run() -> None:
    by_epoch = fit(StandIn(), ROWS, collate, settings=quick(), budget=Epochs(1.5))
    assert by_epoch.steps == 9  # six steps an epoch
    whole = sum(len(row.input_ids) for row in ROWS)
    by_token = fit(StandIn(), ROWS, collate, settings=quick(), budget=Tokens(whole))
    assert (by_token.steps, by_token.tokens) == (6, whole)
    by_time = fit(StandIn(), ROWS, collate, settings=quick(), budget=Seconds(0.05))
    assert by_time.seconds >= 0.05 > by_time.seconds * (1 - 1 / by_time.steps) * 0.5


def test_a_token_budget_needs_tokens() -> None:
    def without_words(rows: object) -> dict[str, torch.Tensor]:
        batch = collate(rows)  # type: ignore[arg-type]
        return {"vectors": batch["input_ids"].float(), "labels": batch["labels"]}

    class OnVectors(StandIn):
        def forward(self, vectors: torch.Tensor, labels: torch.Tensor) -> object:  # type: ignore[override]
            return super().forward(vectors.long(), (vectors != 0).long(), labels)

    with pytest.raises(ConfigurationError, match="no tokens"):
        fit(OnVectors(), ROWS, without_words, settings=quick(), budget=Tokens(5))  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_with_an_explanation(tmp_path: Path) -> None:
    run = StandIn()
    run.poisoned = 4
    with pytest.raises(TrainingError) as caught:
        fit(
            run,
            ROWS,
            collate,
            settings=quick(schedule="constant"),
            budget=Steps(9),
            folder=tmp_path,
        )
    text = str(caught.value)
    assert "loss is not finite" in text and "step 5" in text and "rate 0.02" in text
    assert "rows [" in text and "lower learning rate" in text
    assert all(torch.isfinite(p).all() and p.grad is None for p in run.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors",
        "log.jsonl",
    ]
    assert len(events(tmp_path, "step")) == 4


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    run = StandIn()
    run.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = run.hidden.weight.detach().clone()
    with pytest.raises(TrainingError, match="gradient is not finite"):
        fit(run, ROWS, collate, settings=quick(), budget=Steps(9))
    assert torch.equal(run.hidden.weight, before)


def test_what_cannot_be_trained_is_refused() -> None:
    frozen, dead = StandIn(), StandIn()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        fit(frozen, ROWS, collate, settings=quick(), budget=Steps(1))
    dead.forward = lambda **batch: type("Output", (), {"loss": torch.zeros(())})  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="does not depend on anything trainable"):
        fit(dead, ROWS, collate, settings=quick(), budget=Steps(1))
    with pytest.raises(ConfigurationError, match="no rows"):
        fit(StandIn(), [], collate, settings=quick(), budget=Steps(1))
    with pytest.raises(ConfigurationError, match="patience needs a validation"):
        settings = quick(patience=1, evaluation_every=1)
        fit(StandIn(), ROWS, collate, settings=settings, budget=Steps(1))
    with pytest.raises(ConfigurationError, match="learning_rate is not set"):
        fit(StandIn(), ROWS, collate, settings=quick(learning_rate=None), budget=Steps(1))


def test_the_log_tells_the_run(tmp_path: Path) -> None:
    settings = quick(evaluation_every=2)
    result = fit(
        StandIn(),
        ROWS,
        collate,
        settings=settings,
        budget=Steps(4),
        validate=lambda: {"score": float("nan")},
        folder=tmp_path / "new" / "run",
    )
    lines = events(tmp_path / "new" / "run")
    kinds = ["start", "step", "step", "evaluation", "step", "step", "evaluation", "end"]
    assert [line["event"] for line in lines] == kinds
    assert lines[0]["settings.learning_rate"] == 0.02 and lines[0]["budget"] == "4 steps"
    assert [line["loss"] for line in events(tmp_path / "new" / "run", "step")] == [*result.losses]
    assert lines[3]["scores"] == {"score": None}
    assert lines[-1]["ending"] == "budget" and lines[-1]["kept_step"] == 4


def test_a_run_that_is_done_is_read_not_run(tmp_path: Path) -> None:
    arguments = {"settings": quick(), "budget": Steps(5), "folder": tmp_path}
    first, second = StandIn(), StandIn()
    result = fit(first, ROWS, collate, **arguments)  # type: ignore[arg-type]
    log = (tmp_path / "log.jsonl").read_text()
    assert fit(second, ROWS, collate, **arguments) == result  # type: ignore[arg-type]
    assert second.steps == [] and (tmp_path / "log.jsonl").read_text() == log
    assert torch.equal(first.head.weight, second.head.weight)


def test_without_checkpoints_only_the_log_is_written(tmp_path: Path) -> None:
    settings = quick(checkpoint_every=None)
    for _ in range(2):
        fit(StandIn(), ROWS, collate, settings=settings, budget=Steps(2), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert len(events(tmp_path)) == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": quick(learning_rate=0.5)}, "settings.learning_rate was 0.02 and is now 0.5"),
        ({"budget": Steps(6)}, "budget was '5 steps' and is now '6 steps'"),
        ({"rows": make_rows(22, seed=1)}, "rows was '22 rows"),
        ({"run": StandIn(width=9)}, "trained was '4 tensors"),
    ],
)
def test_another_run_is_refused_in_the_same_folder(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    plain = {"run": StandIn(), "rows": ROWS, "settings": quick(), "budget": Steps(5)}
    fit(**plain, collate=collate, folder=tmp_path)  # type: ignore[arg-type]
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ArtefactError) as caught:
        fit(**{**plain, **changed}, collate=collate, folder=tmp_path)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "end"


def test_rows_that_do_not_show_their_values_cannot_be_resumed(tmp_path: Path) -> None:
    class Opaque:
        input_ids, labels = (1, 2), 0

    rows = [Opaque(), Opaque()]
    fit(StandIn(), rows, collate, settings=quick(), budget=Steps(1))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'Opaque'"):
        fit(StandIn(), rows, collate, settings=quick(), budget=Steps(1), folder=tmp_path)  # type: ignore[arg-type]


def test_length_grouping_pads_less() -> None:
    def padding(grouped: bool) -> int:
        lengths = []

        def watching(rows: object) -> dict[str, torch.Tensor]:
            batch = collate(rows)  # type: ignore[arg-type]
            lengths.append(int((batch["attention_mask"] == 0).sum()))
            return batch

        settings = quick(length_grouped=grouped)
        fit(StandIn(), make_rows(100), watching, settings=settings, budget=Epochs(1))  # type: ignore[arg-type]
        return sum(lengths)

    assert padding(True) < padding(False) / 3
