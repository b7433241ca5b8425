from __future__ import annotations

import collections

import pytest

from deltatune.tasks.embedded.builder import SIZES
from deltatune.tasks.embedded.minimal_pairs import MINIMAL_PAIRS
from deltatune.tasks.embedded.near_duplicates import resemblance, shingles

Parts = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """The generated pairs by split."""
    return {name: [dict(row) for row in rows] for name, rows in MINIMAL_PAIRS.build().items()}


def test_sizes(parts: Parts) -> None:
    assert len(parts["train"]) > 3000
    for name, most in SIZES.items():
        assert 300 < len(parts[name]) <= most
    phenomena = collections.Counter(row["phenomenon"] for row in parts["test"])
    assert len(phenomena) == 6 and min(phenomena.values()) > 20


def test_a_pair_differs_in_one_word(parts: Parts) -> None:
    for row in parts["train"]:
        good, bad = row["sentence_good"].split(), row["sentence_bad"].split()
        assert len(good) == len(bad)
        assert sum(one != other for one, other in zip(good, bad, strict=True)) == 1


def test_no_head_noun_is_in_two_splits(parts: Parts) -> None:
    heads = {
        name: {(row["phenomenon"], row["head"]) for row in rows} for name, rows in parts.items()
    }
    assert not heads["train"] & heads["test"]
    assert not heads["train"] & heads["validation"]
    assert not heads["validation"] & heads["test"]


def test_no_near_duplicate_straddles(parts: Parts) -> None:
    train = [shingles(row["sentence_good"]) for row in parts["train"][:800]]
    test = [shingles(row["sentence_good"]) for row in parts["test"][:60]]
    assert max(resemblance(one, other) for one in train for other in test) < 0.5


def test_the_sentences_are_english(parts: Parts) -> None:
    sentences = {
        (row["phenomenon"], row["sentence_good"], row["sentence_bad"])
        for rows in parts.values()
        for row in rows
    }
    for phenomenon, good, bad in sentences:
        if phenomenon == "determiner_noun":
            plural = good.split()[2] in ("these", "those")
            assert good.rstrip(".").endswith("s") == plural or "knives" in good or "ss." in good
            assert bad.split()[2] in (("this", "that") if plural else ("these", "those"))
        if phenomenon == "anaphor_number":
            assert "themselves" in good and "itself" in bad
        if phenomenon == "polarity":
            assert good.split()[0] in ("No", "Few") and bad.split()[0] in ("Every", "Some")


def test_building_twice_gives_the_same(parts: Parts) -> None:
    assert {name: list(rows) for name, rows in MINIMAL_PAIRS.build().items()} == parts
