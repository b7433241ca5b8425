from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltatune.tasks.embedded.near_duplicates import (
    RESEMBLANCE,
    opening,
    resemblance,
    shingles,
    split_apart,
    split_of,
)

WORDS = st.sampled_from(["return", "the", "list", "of", "items", "given", "by", "name", "index"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=9).map(" ".join), max_size=40)


@given(TEXTS)
def test_no_near_duplicate_straddles(texts: list[str]) -> None:
    parts = split_apart(texts, text=str, key=opening)
    pairs = [("train", "validation"), ("train", "test"), ("validation", "test")]
    for earlier, later in pairs:
        for one in parts[earlier]:
            for other in parts[later]:
                assert resemblance(shingles(one), shingles(other)) < RESEMBLANCE


@given(TEXTS, TEXTS)
def test_a_texts_split_depends_on_itself_alone(texts: list[str], others: list[str]) -> None:
    parts = split_apart([*texts, *others], text=str, key=opening)
    for name, part in parts.items():
        for text in part:
            assert split_of(opening(text)) == name
    # Nothing is ever left out of the test split, and nothing is added.
    assert {t for t in (*texts, *others) if split_of(opening(t)) == "test"} == set(parts["test"])
    assert {t for part in parts.values() for t in part} <= {*texts, *others}


def test_openings_forget_case_punctuation_and_tails() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve"
    assert opening(f"{words} thirteen") == opening(words.upper().replace(" ", ", ")) == words


def test_resemblance_by_hand() -> None:
    # Runs of three: abc bcd against abc bcx.
    assert resemblance(shingles("a b c d"), shingles("A, b c x!")) == 1 / 3
    assert resemblance(shingles("a"), shingles("a")) == 1.0
    assert resemblance(shingles(""), shingles("a b")) == 0.0


def test_a_longer_copy_is_left_out() -> None:
    test = next(f"w{i} is the name of it all" for i in range(99) if split_of(f"w{i}") == "test")
    word = test.split()[0]
    parts = split_apart(
        [(word, test), ("t", "so " + test)],
        text=lambda item: item[1],
        key=lambda item: item[0] if item[0] == word else _train_key(),
    )
    assert parts == {"train": [], "validation": [], "test": [(word, test)]}


def _train_key() -> str:
    return next(f"k{i}" for i in range(99) if split_of(f"k{i}") == "train")
