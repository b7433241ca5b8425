from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, DataError, UnknownNameError
from deltatune.tasks import find_task
from deltatune.tasks.example import Row, Splits, Tables
from deltatune.tasks.splits import cut
from deltatune.tasks.task import Task
from deltatune.tasks.text import normalise


def _texts(splits: Splits) -> list[list[str]]:
    parts = (splits.train, splits.validation, splits.test)
    return [[example.texts[0] for example in part] for part in parts]


def test_clean_removes_what_a_later_split_holds(toy: Task, make: Any) -> None:
    tables = make.tables(
        train=make.rows("in test", "In  TEST ", "in validation", "in both", "own"),
        validation=make.rows("in validation", "in both", "own too"),
        test=make.rows("in test", "in both"),
    )
    splits = cut(toy, tables, "clean")
    assert _texts(splits) == [["own"], ["in validation", "own too"], ["in test", "in both"]]
    assert splits.removed == {
        "train_in_test": 3,
        "train_in_test_exactly": 2,
        "train_in_validation": 1,
        "validation_in_test": 1,
    }
    assert "3 rows of train that test holds too (2 of them letter for letter)" in splits.notes[0]


TEXTS = st.lists(st.sampled_from(["a", "A", "b", " b", "c", "d", "e"]), min_size=1, max_size=9)


@given(TEXTS, TEXTS, TEXTS)
def test_no_text_is_in_two_clean_splits(
    train: list[str], validation: list[str], test: list[str]
) -> None:
    task = find_task("ag_news")
    tables = Tables(
        {
            "train": tuple(Row({"text": text, "label": 0}, "x") for text in train),
            "validation": tuple(Row({"text": text, "label": 0}, "x") for text in validation),
            "test": tuple(Row({"text": text, "label": 0}, "x") for text in test),
        },
        "here",
        "local",
        "0",
    )
    try:
        splits = cut(task, tables, "clean")
    except DataError:
        return  # nothing was left of a split, which is said
    parts = [{normalise(text) for text in part} for part in _texts(splits)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert [example.texts[0] for example in splits.test] == test


@pytest.mark.parametrize(
    ("name", "exactly"),
    [("tweet_eval_hate", 164), ("glue_cola", 14), ("emotion", 11), ("trec", 10)],
)
def test_known_overlaps_of_real_data(data: Path, name: str, exactly: int) -> None:
    splits = find_task(name).load(data, "clean")
    assert splits.removed["train_in_test_exactly"] == exactly
    assert splits.removed["train_in_test"] >= exactly
    assert any("letter for letter" in note for note in splits.notes)


def test_a_missing_test_split_is_held_out_by_text(toy: Task, make: Any) -> None:
    rows = make.rows(*(f"row {i}" for i in range(400)), *(f"ROW {i}" for i in range(400)))
    splits = cut(toy, make.tables(train=rows), "clean")
    sizes = [len(part) for part in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) == 800
    assert 580 < sizes[0] < 700 and 40 < sizes[1] < 120 and 40 < sizes[2] < 120
    assert not any(splits.removed.values())
    again = cut(toy, make.tables(train=rows[::-1]), "clean")
    assert set(_texts(again)[2]) == set(_texts(splits)[2])


def test_a_missing_validation_split(toy: Task, make: Any) -> None:
    rows = make.rows(*(f"row {i}" for i in range(200)))
    splits = cut(toy, make.tables(train=rows, test=make.rows("t")), "clean")
    assert _texts(splits)[2] == ["t"]
    assert len(splits.train) + len(splits.validation) == 200


def test_an_unlabelled_test_split_is_no_test_split(toy: Task, make: Any) -> None:
    tables = make.tables(
        train=make.rows(*(f"row {i}" for i in range(200))),
        validation=make.rows("v"),
        test=make.rows("hidden", label=-1),
    )
    splits = cut(toy, tables, "clean")
    assert _texts(splits)[2] == ["v"]
    assert any("No labelled test split" in note for note in splits.notes)


def test_splits_that_come_out_empty(toy: Task, make: Any) -> None:
    with pytest.raises(DataError, match="the split 'validation' is empty"):
        cut(toy, make.tables(train=make.rows("a"), test=make.rows("b")), "clean")
    with pytest.raises(DataError, match="no training rows"):
        cut(toy, make.tables(test=make.rows("a")), "clean")


def test_a_test_split_without_answers_is_no_test_split(record: dict[str, object]) -> None:
    written = {"kind": "generation", "labels": [], "label": None, "texts": []}
    for fields, target, hidden in (
        (["text", "label"], "{{ label }}", ""),
        (["text", "label"], "{{ label.text }}", {"text": [], "start": []}),
        (["text", "label"], "{{ [text] | option(label) }}", -1),
    ):
        task = Task.model_validate(record | written | {"fields": fields, "target": target})
        known = {"text": ["a"], "start": [0]} if isinstance(hidden, dict) else 0
        rows = tuple(Row({"text": f"row {i}", "label": known}, "x") for i in range(100))
        last = tuple(Row({"text": f"test {i}", "label": hidden}, "x") for i in range(3))
        tables = Tables({"train": rows, "test": last}, "x", "local", "0")
        splits = cut(task, tables, "clean")
        assert len(splits.train) + len(splits.validation) + len(splits.test) == 100


def test_rows_that_a_record_does_not_keep(record: dict[str, object], make: Any) -> None:
    task = Task.model_validate(record | {"keep": "text != 'b'"})
    tables = make.tables(
        train=make.rows("a", "b"), validation=make.rows("c"), test=make.rows("b", "d")
    )
    splits = cut(task, tables, "clean")
    assert _texts(splits) == [["a"], ["c"], ["d"]]
    assert "train: rows that the record does not keep: 1." in splits.notes


def test_rows_that_read_alike_are_the_same_row() -> None:
    task = find_task("crawl_domain")
    tables = Tables(
        {
            "train": (Row({"example": "green map"}, "x"), Row({"example": "blue map"}, "x")),
            "validation": (Row({"example": "red map"}, "x"),),
            "test": (Row({"example": "Greenmap"}, "x"),),
        },
        "here",
        "local",
        "0",
    )
    splits = cut(task, tables, "clean")
    assert [example.targets for example in splits.train] == [("blue map",)]
    assert (splits.removed["train_in_test"], splits.removed["train_in_test_exactly"]) == (1, 0)


def test_a_rule_that_draws_a_sample_halves_it(make: Any) -> None:
    import numpy

    task = find_task("yelp_polarity")
    lines = list(range(38000))
    numpy.random.RandomState(42).shuffle(lines)
    pool = tuple(Row({"text": str(i), "label": 0}, "x") for i in range(38000))
    splits = cut(task, make.tables(train=make.rows("a"), test=pool), "faithful")
    assert [int(e.source) for e in (*splits.validation, *splits.test)] == lines[:7600]
    assert len(splits.validation) == 3800


def test_rows_without_text_are_left_out_where_the_record_says_so(make: Any) -> None:
    task = find_task("tweet_eval_hate")
    tables = make.tables(
        train=make.rows("a", " \n"), validation=make.rows("b"), test=make.rows("c")
    )
    splits = cut(task, tables, "clean")
    assert len(splits.train) == 1
    assert "train: rows with empty text left out: 1." in splits.notes


def test_faithful_needs_a_rule_and_its_rows(toy: Task, make: Any) -> None:
    tables = make.tables(train=make.rows("a"), validation=make.rows("b"), test=make.rows("c"))
    with pytest.raises(ConfigurationError, match="no split rule"):
        cut(toy, tables, "faithful")
    with pytest.raises(DataError, match="needs the published validation split of 408 rows"):
        cut(find_task("glue_mrpc"), tables, "faithful")
    with pytest.raises(UnknownNameError, match="Did you mean 'faithful'"):
        cut(toy, tables, "faithfull")  # type: ignore[arg-type]


def test_rule_b_halves_the_published_validation_split(make: Any) -> None:
    task = find_task("glue_rte")
    values = {"sentence1": "a", "label": 0}
    pool = tuple(Row(values | {"sentence2": str(i)}, "x") for i in range(277))
    rest = tuple(Row(values | {"sentence2": "t"}, "x") for _ in range(5))
    # The folder's test split is the published validation split; its validation came out of train.
    splits = cut(task, make.tables(train=rest[:3], validation=rest[3:], test=pool), "faithful")
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [5, 138, 139]
    assert splits.validation[0].texts[1] == "0" and splits.test[0].texts[1] == "138"
    assert any("5 of the 2490 published rows" in note for note in splits.notes)


def test_rule_b_does_not_test_on_training_rows(make: Any) -> None:
    task = find_task("glue_rte")
    values = {"sentence1": "a", "label": 0}
    pool = tuple(Row(values | {"sentence2": str(i)}, "x") for i in range(277))
    tables = make.tables(train=pool[:200], validation=pool[200:240], test=pool[240:])
    with pytest.raises(DataError, match="cannot give it"):
        cut(task, tables, "faithful")


def test_rule_c_is_crossfits_shuffle_of_the_published_order(make: Any) -> None:
    import numpy

    task = find_task("blimp_anaphor_gender_agreement")
    rows = [
        Row({"sentence_good": f"g{i}", "sentence_bad": "b", "pair_id": i}, "x") for i in range(1000)
    ]
    lines = list(range(1000))
    numpy.random.RandomState(42).shuffle(lines)
    tables = make.tables(
        train=tuple(rows[200:]), validation=tuple(rows[:100]), test=tuple(rows[100:200])
    )
    splits = cut(task, tables, "faithful")
    shown = [sorted(example.texts)[1] for example in (*splits.train, *splits.validation)]
    assert shown == [f"g{i}" for i in lines[:900]]
    assert len(splits.test) == 100


def test_real_data_by_the_rules_of_the_paper(data: Path) -> None:
    found = {
        name: find_task(name).load(data, "faithful")
        for name in ("glue_cola", "trec", "blimp_anaphor_gender_agreement")
    }
    sizes = {name: (len(s.validation), len(s.test)) for name, s in found.items()}
    assert sizes == {
        "glue_cola": (521, 522),
        "trec": (545, 546),
        "blimp_anaphor_gender_agreement": (100, 100),
    }


def test_the_status_of_the_source_is_carried(data: Path) -> None:
    splits = find_task("boolq").load(data)
    assert splits.status == "partial"
    assert any("marked 'partial'" in note for note in splits.notes)
    assert find_task("trec").load(data).status == "complete"
