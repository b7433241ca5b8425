from __future__ import annotations

import pytest

from deltatune.core.errors import ConfigurationError, DataError
from deltatune.evaluation import score
from deltatune.tasks import TASKS, Example
from deltatune.tasks.example import Row


def _examples(name: str, *labels: float) -> list[Example]:
    task = TASKS[name]
    values: dict[str, object] = dict.fromkeys(task.fields, "a")
    return [task.example(Row({**values, str(task.label): label}, "x")) for label in labels]


def test_one_metric_for_indices_and_words() -> None:
    task, examples = TASKS["glue_cola"], _examples("glue_cola", 0, 1, 1, 0)
    by_index = score(task, [0, 1, 0, 1], examples)
    words = ["unacceptable", "acceptable", "unacceptable", "acceptable"]
    assert score(task, words, examples) == by_index
    assert next(iter(by_index)) == "Matthew-Correlation"
    assert by_index == {"Matthew-Correlation": 0.0, "ACC": 0.5, "invalid": 0.0}


def test_answers_that_are_no_label_are_counted() -> None:
    scores = score(TASKS["trec"], ["DESC", "desc", "what"], _examples("trec", 2, 2, 2))
    assert scores["invalid"] == 2 / 3
    assert scores["Classification-F1-gold"] > scores["Classification-F1"]


def test_regression_is_scored_against_the_labels() -> None:
    task, examples = TASKS["glue_stsb"], _examples("glue_stsb", 1.1, 2.3, 4.9)
    exact = score(task, [1.1, 2.3, 4.9], examples)
    assert exact["Pearson-Correlation"] == pytest.approx(1.0)
    texts = score(task, ["1.2", "2.4", "none"], examples)
    assert texts["Pearson-Correlation"] < 1.0 and texts["unparsable"] == 1 / 3


def test_generation() -> None:
    example = TASKS["samsum"].example(Row({"dialogue": "a", "summary": "They met."}, "x"))
    assert score(TASKS["samsum"], ["They met."], [example]) == {"Rouge-L": 1.0}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="the class 6 was predicted, but there are 6 labels"):
        score(TASKS["trec"], [6], _examples("trec", 0))
    with pytest.raises(ConfigurationError, match="2 predictions for 1 examples"):
        score(TASKS["trec"], [1, 2], _examples("trec", 0))
