"""Tasks as cloze: templates and words of LM-BFF and PET."""

from __future__ import annotations

import pytest

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.tasks.example import Row
from deltatune.tasks.manual import as_cloze
from deltatune.tasks.records import find_task
from deltatune.tasks.reference import manual_templates

WITH_WORDS = sorted(
    {
        row["table1_task_id"]
        for row in manual_templates()
        if row["table1_task_id"] and "{mask}" in row["template"] and row["style"] == "manual"
    }
)


def test_there_are_manual_templates_for_the_tasks_of_table_2() -> None:
    assert {"glue_cola", "glue_sst2", "glue_mnli", "boolq", "superglue_wic"} <= {*WITH_WORDS}


@pytest.mark.parametrize("name", WITH_WORDS)
def test_every_pattern_becomes_a_task(name: str) -> None:
    numbers = [
        row["pattern_id"]
        for row in manual_templates()
        if row["table1_task_id"] == name and row["style"] == "manual"
    ]
    plain = find_task(name)
    for number in numbers:
        cloze = as_cloze(plain, f"manual:{number}")
        assert cloze.template.count("<extra_id_0>") == 1
        assert all(word.startswith("<extra_id_0> ") for word in cloze.labels)
        assert len({*cloze.labels}) == len(plain.labels)
        assert cloze.digest != plain.digest


def test_rows_are_read_as_before_and_answered_by_the_words() -> None:
    plain = find_task("glue_rte")
    cloze = as_cloze(plain, "manual")
    values = {"sentence1": "It rains.", "sentence2": "The street is wet."}
    for index, label in enumerate(plain.labels):
        for said in (index, label):
            row = Row({**values, "label": said}, "a test")
            ours, theirs = cloze.example(row), plain.example(row)
            assert ours.label == theirs.label
            assert ours.targets == (cloze.labels[int(theirs.label or 0)],)
    assert ours.source == "It rains? <extra_id_0>, the street is wet."
    assert dict(zip(plain.labels, cloze.labels, strict=True)) == {
        "entailment": "<extra_id_0> Yes",
        "not_entailment": "<extra_id_0> No",
    }


def test_what_has_no_template_says_so() -> None:
    with pytest.raises(ConfigurationError, match="emotion has no template"):
        as_cloze(find_task("emotion"), "manual")
    with pytest.raises(UnknownNameError, match="manual"):
        as_cloze(find_task("glue_rte"), "manuel")
    with pytest.raises(UnknownNameError, match="'9'"):
        as_cloze(find_task("boolq"), "manual:9")
    with pytest.raises(ConfigurationError, match="no_template"):
        as_cloze(find_task("boolq"), "no_template")
