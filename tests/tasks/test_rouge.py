from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.tasks.rouge import rouge_l

WORD = st.sampled_from(["the", "cat", "Cat", "sat", "on", "mat", "it", "ran"])
TEXT = st.lists(st.one_of(WORD, st.just(".")), min_size=1, max_size=14).map(" ".join)

# Prediction, reference, "rouge-l" "f" of the package rouge 1.0.0 (get_scores, rounded).
STORED = [
    ("the cat sat on the mat", "the cat lay on the mat", 0.79999999500),
    ("Amanda baked cookies. Jerry wants some.", "Amanda baked cookies for Jerry.", 0.72727272231),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.61538461065),
    ("He ran. He sat . ", "He sat. She ran.", 0.74999999500),
    ("a b c", "c b a", 0.33333332833),
]


@pytest.mark.parametrize(("prediction", "reference", "expected"), STORED)
def test_stored_values(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=2e-8)


@settings(max_examples=200)
@given(TEXT, TEXT)
def test_equals_the_package(prediction: str, reference: str) -> None:
    rouge = pytest.importorskip("rouge")
    if not prediction.strip(". ") or not reference.strip(". "):
        assert rouge_l(prediction, reference) == 0.0
        return
    theirs = rouge.Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"]["f"]
    assert rouge_l(prediction, reference) == pytest.approx(theirs, abs=2e-8)


@given(TEXT)
def test_a_text_equals_itself(text: str) -> None:
    assert rouge_l(text, text) == (1.0 if text.strip(". ") else 0.0)


@pytest.mark.parametrize("empty", ["", "  ", ".", "...!", "\n"])
def test_nothing_said(empty: str) -> None:
    assert rouge_l(empty, "a cat") == 0.0
    assert rouge_l("a cat", empty) == 0.0


def test_long_texts() -> None:
    # The package overflows the stack here.
    text = " ".join(f"word{number}" for number in range(1100))
    assert rouge_l(text, text) == 1.0
