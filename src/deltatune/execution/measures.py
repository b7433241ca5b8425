"""What is measured on a trained delta beside its own score, where a cell's options ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltatune.backbones.load import Backbone
from deltatune.core.delta import Delta
from deltatune.core.errors import DataError, UnsupportedError
from deltatune.evaluation.general_text import general_loss, read_texts
from deltatune.execution.goals import Goals, goals_of
from deltatune.execution.ground import evaluate_on
from deltatune.tasks.sources.reading import sha256
from deltatune.tasks.task import Task

__all__ = ["TRAINING", "measure", "on_text", "transferred"]

TEXTS = 200
TRAINING = "training"  # the task's metric on rows that were trained on


def transferred(task: str) -> str:
    """The name of a delta's score on another task, as it is."""
    return f"on {task}"


def measure(
    backbone: Backbone,
    goals: Goals,
    options: Mapping[str, Any],
    *,
    protocol: str,
    data: str | Path | None,
    on: Callable[[int], AbstractContextManager[None]],
) -> dict[str, float]:
    """Returns what the options ask for, by name.

    `score_training=n`: the score on n of the training rows. `transfer_to="one + another"`: the
    scores on the test rows of other tasks, with the delta as it was trained.

    Args:
        backbone: with the delta, as it was trained.
        goals: the tasks it was trained on.
        options: of the cell.
        protocol: see `goals_of`.
        data: see `goals_of`.
        on: see `Goals.evaluate`.

    Raises:
        UnsupportedError: another task needs a head that this delta does not have.
    """
    found: dict[str, float] = {}
    if rows := options.get("score_training"):
        seen = Goals(
            replace(goal, splits=goal.splits.limit(train=int(rows), seed=1)) for goal in goals
        )
        found[TRAINING] = seen.evaluate(backbone, "train", options, on).scores[goals.metric]
    if targets := options.get("transfer_to"):
        for other in goals_of(str(targets), protocol, data, options):
            _check_head(backbone, goals, other.task)
            scores = evaluate_on(backbone, other.task, other.splits.test, options=options).scores
            found[transferred(other.task.name)] = scores[other.task.metric]
    return found


def _check_head(backbone: Backbone, goals: Goals, other: Task) -> None:
    """Raises UnsupportedError where what was learned gives no answer to another task."""
    known = {(task.kind, task.head_width) for task in goals.tasks}
    if backbone.form == "encoder" and known != {(other.kind, other.head_width)}:
        raise UnsupportedError(
            f"The head that learned {goals.name} cannot answer {other.name}: on an encoder both "
            "tasks need as many labels. Transfer between others on a text-to-text backbone."
        )


def on_text(backbone: Backbone, delta: Delta, options: Mapping[str, Any]) -> dict[str, float]:
    """Returns the loss on texts of no task, "text", and that of the backbone alone beside it, where
    the delta can be switched off.

    `general_text="file.jsonl"`: rows with a field `text`, of which the first 200 are read.

    Raises:
        DataError: the file cannot be read, or is not that of `general_digest`.
        UnsupportedError: the backbone predicts no text.
    """
    if options.get("general_text") is None:
        return {}
    path = Path(str(options["general_text"]))
    wanted, there = options.get("general_digest"), sha256(path)[:16]
    if wanted not in (None, there):
        raise DataError(
            f"{path} is another file than the study began with ({there}, not {wanted}). Put that "
            "one back, or begin anew in another folder."
        )
    texts = read_texts(path, TEXTS)
    found = {"text": general_loss(backbone, texts)}
    if not delta.expression.in_place:
        with delta.active(False):
            found["text, delta off"] = general_loss(backbone, texts)
    return found
