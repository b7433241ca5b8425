from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deltatune.core.errors import DataError
from deltatune.tasks import find_task
from deltatune.tasks.example import Row
from deltatune.tasks.task import Task


def _row(**values: object) -> Row:
    return Row(values, "toy.jsonl:7")


def test_both_forms_come_from_one_row(toy: Task) -> None:
    example = toy.example(_row(text=" fine ", label=1))
    assert example.source == "say: fine"
    assert example.targets == ("good",)
    assert example.texts == (" fine ",)
    assert example.label == 1
    assert toy.head_width == 2


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (1, 1), ("good", 1), ("1", 1), (True, 1), (1.0, 1)]
)
def test_labels_by_word_or_index(toy: Task, value: object, expected: int) -> None:
    assert toy.example(_row(text="a", label=value)).label == expected


@pytest.mark.parametrize("value", [2, -1, "god", 0.5, [1], "²"])
def test_a_label_outside_the_set(toy: Task, value: object) -> None:
    with pytest.raises(DataError, match=r"toy.jsonl:7: the label .* is not one of"):
        toy.example(_row(text="a", label=value))


def test_the_nearest_label_is_named(toy: Task) -> None:
    with pytest.raises(DataError, match="Did you mean 'good'"):
        toy.example(_row(text="a", label="goood"))


def test_a_word_wins_over_an_index(record: dict[str, object]) -> None:
    task = Task.model_validate(record | {"labels": ["1", "2", "3"]})
    assert task.example(_row(text="a", label=1)).targets == ("1",)


def test_a_missing_column_names_the_nearest(toy: Task) -> None:
    with pytest.raises(DataError, match=r"toy.jsonl:7: .*'text'. Did you mean 'texts'"):
        toy.example(_row(texts="a", label=1))


def test_an_empty_column(toy: Task) -> None:
    with pytest.raises(DataError, match="'text' is empty"):
        toy.example(_row(text=None, label=1))


def test_labels_in_the_order_of_the_source_are_mapped_by_name() -> None:
    # Today's hub order is ABBR ENTY DESC HUM LOC NUM.
    trec = find_task("trec")
    words = [trec.example(_row(text="a", coarse_label=i)).targets[0] for i in range(6)]
    assert words == ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
    assert trec.example(_row(text="a", coarse_label=0)).label == trec.labels.index("ABBR") == 2


def test_regression() -> None:
    stsb = find_task("glue_stsb")
    example = stsb.example(_row(sentence1="a", sentence2="b", label=2.5))
    assert (example.label, example.targets) == (2.5, ("2.4",))
    assert stsb.head_width == 1
    with pytest.raises(DataError, match="not a number"):
        stsb.example(_row(sentence1="a", sentence2="b", label="high"))


def test_generation_has_no_head() -> None:
    samsum = find_task("samsum")
    example = samsum.example(_row(dialogue="A: hi\r\nB: ho", summary="They\ngreet."))
    assert example.source == "summarize: A: hi B: ho"
    assert example.targets == ("They greet.",)
    assert (example.texts, example.label, samsum.head_width) == ((), None, None)


WORDS = st.text("abcé ", min_size=1, max_size=9)


@given(WORDS, WORDS)
def test_a_pair_is_shown_in_an_order_of_its_own(good: str, bad: str) -> None:
    task = find_task("blimp_anaphor_gender_agreement")
    example = task.example(_row(sentence_good=good, sentence_bad=bad))
    assert example.label in (0, 1)
    assert example.texts == ((good, bad) if example.label == 0 else (bad, good))
    assert example.targets == (f"sentence {int(example.label) + 1}",)


def test_the_order_of_pairs_is_balanced() -> None:
    task = find_task("minimal_pairs")
    rows = [_row(sentence_good=f"good {i}", sentence_bad=f"bad {i}") for i in range(400)]
    assert 160 < sum(int(task.example(row).label or 0) for row in rows) < 240


def test_identity_is_of_content(toy: Task) -> None:
    one = toy.example(_row(text="a", label=1))
    other = toy.example(Row({"text": "a", "label": "good"}, "elsewhere:1"))
    assert one.identity == other.identity != toy.example(_row(text="a", label=0)).identity


WRITTEN = {"kind": "generation", "labels": [], "label": None, "texts": []}


def test_several_right_answers(record: dict[str, object]) -> None:
    record |= WRITTEN | {"answers": "more.names"}
    task = Task.model_validate(record | {"fields": ["text", "more"]})
    row = {"text": "a", "more": {"names": ["b", "c", "b"]}}
    assert task.example(_row(**row)).targets == ("b", "c")
    assert task.outputs == ("more",) and task.inputs == ("text",)
    mapping = {"text": "a", "more": {"names": {"b": 3, "c": 1}}}
    assert task.example(_row(**mapping)).targets == ("b", "c")
    for wrong, message in ((0, "not a list"), ("b", "not a list"), ([], "no answer")):
        with pytest.raises(DataError, match=message):
            task.example(_row(text="a", more={"names": wrong}))


def test_fields_that_are_derived_and_rows_that_are_kept(record: dict[str, object]) -> None:
    task = Task.model_validate(
        record
        | {"fields": ["text", "votes-cast"], "label": "vote", "keep": "vote is not none"}
        | {"derive": {"vote": "votes_cast | majority"}}
    )
    row = _row(**{"text": "a", "votes-cast": [1, 1, 0]})
    assert task.keeps(row) and task.example(row).targets == ("good",)
    assert not task.keeps(_row(**{"text": "a", "votes-cast": [1, 0]}))
    assert task.inputs == ("text",) and task.outputs == ("votes-cast",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"derive": {"one": "txt | strip"}}, "Did you mean 'text'"),
        ({"derive": {"one": "text | stripp"}}, "Did you mean 'strip'"),
        ({"keep": "lable"}, "Did you mean 'label'"),
        ({"answers": "[text]"}, "no `target`"),
        (WRITTEN | {"answers": "[txt]"}, "Did you mean 'text'"),
        (WRITTEN | {"answers": "[text]", "target": "a"}, "needs a `target`, or `answers`"),
        ({"labels": ["one"]}, "at least two"),
        ({"labels": ["one", "one"]}, "same word"),
        ({"label": None}, "needs `label`"),
        ({"target": "{{ text }}"}, "no `target`"),
        ({"source_labels": ["bad", "better"]}, "the same words"),
        ({"metric": "ACCC"}, "Did you mean 'ACC'"),
        ({"template": "{{ txt }}"}, "Did you mean 'text'"),
        ({"label": "labels"}, "Did you mean 'label'"),
        ({"kind": "generation", "labels": []}, "needs a `target`"),
        ({"kind": "generation", "labels": [], "target": "{{ text }}"}, "no meaning"),
        ({"kind": "generation", "target": "{{ text }}", "label": None}, "no `labels`"),
        ({"texts": ["a", "b", "c"]}, "at most 2"),
        ({"name": "No Spaces"}, "pattern"),
        ({"version": 0}, "greater than or equal to 1"),
    ],
)
def test_records_that_cannot_be_meant(
    record: dict[str, object], change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Task.model_validate(record | change)


def test_a_record_is_frozen_and_its_digest_is_of_what_matters(record: dict[str, object]) -> None:
    task = Task.model_validate(record)
    with pytest.raises(ValidationError):
        task.name = "other"  # type: ignore[misc]
    assert Task.model_validate(record | {"title": "other"}).digest == task.digest
    assert Task.model_validate(record | {"template": "{{ text }}"}).digest != task.digest


def test_label_words(toy: Task) -> None:
    assert toy.label_words([1, 0]) == ["good", "bad"]
