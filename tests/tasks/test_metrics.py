from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.tasks.metrics import METRICS, evaluate

WORDS = st.sampled_from(["cat", "dog", "The cat", "cow!", ""])


def _one(*targets: str) -> list[tuple[str, ...]]:
    return [(target,) for target in targets]


def test_the_first_key_is_the_metric() -> None:
    for name in METRICS:
        assert next(iter(evaluate(name, ["1", "2"], _one("1", "3")))) == name


def test_accuracy_by_hand() -> None:
    assert evaluate("ACC", ["Yes", "no", "yes."], _one("yes", "no", "yes"))["ACC"] == 2 / 3
    assert evaluate("ACC", ["b"], [("a", "B")])["ACC"] == 1.0


def test_exact_match_by_hand() -> None:
    predictions = ["The cat!", "a  dog", "theatre", "its"]
    targets = [("cat",), ("an dog", "x"), ("atre",), ("it's",)]
    assert evaluate("EM", predictions, targets)["EM"] == 3 / 4


def test_question_f1_by_hand() -> None:
    scores = evaluate("QA-F1", ["the red red cat", "dog"], [("red cat sat", "zebra"), ("cat",)])
    # Normalised: red red cat against red cat sat; two words in common, 2 * 2 / (3 + 3).
    assert scores["QA-F1"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["EM"] == 0.0


def test_classification_f1_by_hand() -> None:
    # a: 1 of 1 predicted, 1 of 2 gold: 2/3. b: 1 of 1, 1 of 1: 1. The answer "c" is a class with F1
    # 0.
    scores = evaluate("Classification-F1", ["a", "c", "b"], _one("a", "a", "b"))
    assert scores["Classification-F1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["Classification-F1-gold"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["ACC"] == pytest.approx(2 / 3)


def test_classification_f1_counts_case_and_looks_at_the_first_target() -> None:
    assert evaluate("Classification-F1", ["A"], _one("a"))["Classification-F1"] == 0.0
    assert evaluate("Classification-F1", ["b"], [("a", "b")])["Classification-F1"] == 0.0


def test_matthews_by_hand() -> None:
    yes, no = "acceptable", "unacceptable"
    predictions = [yes, yes, no, "nonsense", yes]
    scores = evaluate("Matthew-Correlation", predictions, _one(yes, no, no, no, yes))
    # tp 2, tn 2, fp 1, fn 0.
    expected = (2 * 2 - 1 * 0) / math.sqrt((2 + 1) * (2 + 0) * (2 + 1) * (2 + 0))
    assert scores["Matthew-Correlation"] == pytest.approx(expected)
    same = evaluate("Matthew-Correlation", [yes, yes], _one(yes, no))
    assert same["Matthew-Correlation"] == 0.0


def test_pearson_by_hand_and_by_library() -> None:
    from scipy.stats import pearsonr, spearmanr

    gold, found = [1.0, 2.0, 3.0, 5.0], [1.5, 1.0, 4.0, 4.5]
    scores = evaluate("Pearson-Correlation", [str(v) for v in found], _one(*map(str, gold)))
    centred = [(g - 2.75, f - 2.75) for g, f in zip(gold, found, strict=True)]
    expected = sum(g * f for g, f in centred) / math.sqrt(
        sum(g * g for g, _ in centred) * sum(f * f for _, f in centred)
    )
    assert scores["Pearson-Correlation"] == pytest.approx(expected)
    assert scores["Pearson-Correlation"] == pytest.approx(pearsonr(gold, found).statistic)
    assert scores["Spearman-Correlation"] == pytest.approx(spearmanr(gold, found).statistic)
    assert scores["unparsable"] == 0.0


def test_answers_that_are_no_numbers_carry_no_information() -> None:
    scores = evaluate("Pearson-Correlation", ["1", "nan", "five", "4"], _one("1", "2", "3", "4"))
    filled = evaluate("Pearson-Correlation", ["1", "2.5", "2.5", "4"], _one("1", "2", "3", "4"))
    assert scores["unparsable"] == 0.5
    assert scores["Pearson-Correlation"] == filled["Pearson-Correlation"]
    alike = evaluate("Pearson-Correlation", ["x", "x"], _one("1", "2"))
    assert alike["Pearson-Correlation"] == 0.0


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
def test_laws_of_the_text_metrics(pairs: list[tuple[str, str]]) -> None:
    predictions = [prediction for prediction, _ in pairs]
    targets = [(target,) for _, target in pairs]
    scores = {name: evaluate(name, predictions, targets) for name in ("ACC", "EM", "QA-F1")}
    for name, found in scores.items():
        assert 0.0 <= found[name] <= 1.0
    assert scores["EM"]["EM"] >= scores["ACC"]["ACC"]
    right = evaluate("ACC", [target for _, target in pairs], targets)
    assert right["ACC"] == 1.0
    more = evaluate("QA-F1", predictions, [(*answers, "cat") for answers in targets])
    assert more["QA-F1"] >= scores["QA-F1"]["QA-F1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcx")), min_size=1))
def test_macro_f1_equals_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    gold, found = [g for g, _ in pairs], [f for _, f in pairs]
    expected = f1_score(gold, found, average="macro", zero_division=0.0)
    scores = evaluate("Classification-F1", found, _one(*gold))
    assert scores["Classification-F1"] == pytest.approx(expected)
    assert scores["Classification-F1-gold"] >= scores["Classification-F1"] - 1e-12


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UnknownNameError, match="'ACC'"):
        evaluate("ACCC", ["a"], _one("a"))
    with pytest.raises(ConfigurationError, match="0 predictions for 0 examples"):
        evaluate("ACC", [], [])
    with pytest.raises(ConfigurationError, match="1 predictions for 2 examples"):
        evaluate("ACC", ["a"], _one("a", "b"))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def refuse(name: str, *rest: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)
    with pytest.raises(UnsupportedError, match=r"deltatune\[study\]"):
        evaluate("Classification-F1", ["a"], _one("a"))
