"""Scores of predictions, for every form by the task's one metric."""

from __future__ import annotations

from collections.abc import Sequence

from deltatune.core.errors import DataError
from deltatune.tasks.example import Example
from deltatune.tasks.metrics import evaluate
from deltatune.tasks.task import Task

__all__ = ["score"]


def score(
    task: Task,
    predictions: Sequence[str] | Sequence[int] | Sequence[float],
    examples: Sequence[Example],
) -> dict[str, float]:
    """Returns the scores of the predictions; fractions, the task's own metric first.

    For a classification task "invalid" is the share of answers that are no label word; it is 0 for
    an encoder's head. A regression is scored against the labels themselves, not their rounded
    texts.

    Args:
        task: the record.
        predictions: as `predict` returns them: texts, class indices or values.
        examples: what they answer to, in the same order.

    Raises:
        ConfigurationError: no example, or not as many predictions as examples.
        DataError: a class index is outside the label set.
    """
    answers = [_text(task, prediction) for prediction in predictions]
    if task.kind == "regression":
        targets: list[tuple[str, ...]] = [(str(example.label),) for example in examples]
    else:
        targets = [example.targets for example in examples]
    scores = evaluate(task.metric, answers, targets)
    if task.kind == "classification":
        scores["invalid"] = sum(answer not in task.labels for answer in answers) / len(answers)
    return scores


def _text(task: Task, prediction: str | int | float) -> str:
    if isinstance(prediction, str):
        return prediction
    if task.kind != "classification":
        return str(prediction)
    index = int(prediction)
    if not 0 <= index < len(task.labels):
        raise DataError(
            f"{task.name}: the class {index} was predicted, but there are {len(task.labels)} "
            "labels."
        )
    return task.labels[index]
