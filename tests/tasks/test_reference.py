"""The reference tables, and our records against them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltatune.core.errors import UnknownNameError
from deltatune.tasks import TASKS
from deltatune.tasks.example import Example, Row, Tables
from deltatune.tasks.reference import manual_templates, table1, task_row, tasks
from deltatune.tasks.specification import HubSpecification
from deltatune.tasks.splits import cut
from deltatune.tasks.task import Task

IDS = [row["task_id"] for row in tasks()]

# Samsung/samsum has been reported gone; the record names a copy, which has no configuration.
COPIED = {"samsum"}


def test_the_tables_are_whole() -> None:
    assert (len(tasks()), len(table1()), len(manual_templates())) == (104, 122, 49)
    printed = {row["task_id"] for row in table1() if row["kind"] == "task"}
    assert printed == {row["task_id"] for row in tasks()}


def test_an_unknown_task_id() -> None:
    with pytest.raises(UnknownNameError, match="glue_sst2"):
        task_row("glue_sst")


def test_the_average_of_all_tasks_adds_up() -> None:
    for column in ("pt_base", "pt_large", "pf", "lr", "ap", "ft"):
        scores = [float(row[column]) for row in table1() if row["kind"] == "task"]
        printed = [row for row in table1() if "ALL TASKS" in row["name"]]
        assert abs(sum(scores) / len(scores) - float(printed[0][column])) < 0.006


# How tasks.csv says things, and how a record does. Whatever else differs is an exception below.
NOTATION = {
    "rows": 'replace("\\n", " [n] ")',
    "fill": 'replace("[X]", sub_label) | replace("[Y]", "[MASK]")',
    "mask": 'replace("<mask>", "[MASK]")',
    "bs_n": "bs_n",
    **{name: name for name in ("strip", "clean", "join", "squash", "nl")},
}
OPTIONS = {
    "cosmos_qa": "[answer0, answer1, answer2, answer3]",
    "dream": "choice",
    "hellaswag": "endings",
    "race_high": "options",
    "race_middle": "options",
    "cos_e": "choices",
    "sciq": "[distractor1, distractor2, distractor3, correct_answer] | shuffled",
}
# The notes of tasks.csv say that carriage return and tab become spaces too.
FLAT = {"race_high", "race_middle", "health_fact"}
# Written out, because their notation stands for code or the note changes it; see the tests below.
WRITTEN_OUT = {"hotpot_qa", "wiki_bio", "acronym_identification", "onestop_english", "liar"}
KEYS = {
    "cosmos_qa": "label",
    "hellaswag": "label",
    "superglue_copa": "label",
    "quarel": "answer_index",
    "wino_grande": "answer, first=1",
    "race_high": "answer",
    "race_middle": "answer",
    "wiqa": "answer_label_as_choice",
}
OF_TWO = {"superglue_copa": "[choice1, choice2]", "wino_grande": "[option1, option2]"}
CLEANED = {"cleaned": " | clean", "stripped": " | strip", "newlines as spaces": " | nl"}
TARGETS = {
    "acronym_identification": "{{ tokens | where(labels, [0, 2]) | join }}",
    "superglue_record": "{{ answers | option(0) }}",
    "adversarial_qa": "{{ answers.text | option(0) }}",
    "quarel": "{{ question | options | option(answer_index) }}",
}
ANSWERS = {
    "freebase_qa": 'Parses.Answers | column("AnswersName") | distinct',
    "web_questions": "answers",
    "proto_qa": "answers.raw",
    **{f"eli5_{name}": 'answers.text | each("clean")' for name in ("askh", "asks", "eli5")},
}


def _jinja(name: str, template: str) -> str:
    """The notation of tasks.csv in jinja."""

    def expression(found: re.Match[str]) -> str:
        field, *filters = found.group(1).split("|")
        filters = ["flat" if part == "nl" and name in FLAT else NOTATION[part] for part in filters]
        if field == "choices":
            field, filters = OPTIONS.get(name, "choices.text"), ["choices", *filters]
        return "{{ " + " | ".join((field.replace("-", "_"), *filters)) + " }}"

    return re.sub(r"\{([^}]+)\}", expression, template)


def _target(name: str, row: dict[str, str]) -> str | None:
    if row["task_type"] == "classification" or row["multi_target"] == "yes":
        return None
    if name in TARGETS:
        return TARGETS[name]
    if row["target"] == "text of the right option":
        options = OF_TWO.get(name, OPTIONS.get(name, "choices.text"))
        return f"{{{{ {options} | option({KEYS.get(name, 'answerKey')}) }}}}"
    found = re.fullmatch(r"field (\w+)(?: \([^)]*\))?(?:, (.+))?", row["target"])
    assert found is not None, row["target"]
    return f"{{{{ {found.group(1)}{CLEANED.get(found.group(2), '')} }}}}"


@pytest.mark.parametrize("name", IDS)
def test_a_record_agrees_with_its_row(name: str) -> None:
    task, row = TASKS[name], task_row(name)
    if name not in WRITTEN_OUT:
        assert task.template == _jinja(name, row["source_template"])
    assert "|".join(task.labels) == row["label_words"]
    assert task.target == _target(name, row)
    assert task.answers == ANSWERS.get(name)
    assert (task.answers is not None) == (row["multi_target"] == "yes")
    assert task.metric == row["metric"]
    assert (task.kind == "classification") == (row["task_type"] == "classification")
    assert task.has_head == (task.kind == "classification")
    assert task.title == row["name"]
    assert task.provenance.category == row["category"]
    assert task.provenance.crossfit == row["crossfit_id"]
    assert task.lengths.source == int(row["src_len_hint"])
    assert task.lengths.target == int(row["tgt_len_hint"])
    assert isinstance(task.source, HubSpecification)
    if name not in COPIED:
        assert task.source.dataset == row["hub_id_now"]
        assert row["hf_config"] in (task.source.config, "")


PUBLISHED = {
    "context": {"title": ["a", "b"], "sentences": [["One.", " Two."], ["Three."]]},
    "supporting_facts": {"title": ["b"], "sent_id": [0]},
    "input_text": {
        "context": " who ",
        "table": {"column_header": ["name", "born"], "content": ["a\nb ", "1"]},
    },
    "tokens": ["deep", "learning", "(", "DL", ")"],
    "labels": [0, 2, 4, 1, 4],
    "text": "Intermediate \nIntermediate words",
    "statement": "a\tb",
    "speaker": "c\r",
    "question": "Q?",
    "answer": "A",
    "target_text": "t\nu",
    "label": 1,
}
SHOWN = {
    "hotpot_qa": "question: Q? context: Three. ",
    "wiki_bio": "who [SEP] name: a b [n] born: 1 [n] ",
    "acronym_identification": "deep learning ( DL ) [SEP] acronym: DL",
    "onestop_english": "Intermediate words",
    "liar": "statement: a b [SEP] speaker: c  [SEP] context: d e",
}


@pytest.mark.parametrize("name", sorted(WRITTEN_OUT))
def test_what_the_notation_cannot_say(name: str) -> None:
    values = PUBLISHED | ({"context": "d\ne"} if name == "liar" else {})
    assert TASKS[name].example(Row(values, "here")).source == SHOWN[name]


def test_a_paragraph_is_followed_by_a_space() -> None:
    both = PUBLISHED | {"supporting_facts": {"title": ["a", "b"], "sent_id": [0, 0]}}
    example = TASKS["hotpot_qa"].example(Row(both, "here"))
    assert example.source == "question: Q? context: One. Two. Three. "
    assert example.targets == ("A",)


@pytest.mark.parametrize("name", IDS)
def test_a_split_rule_agrees_with_its_row(name: str) -> None:
    task, row = TASKS[name], task_row(name)
    assert task.splits is not None and isinstance(task.source, HubSpecification)
    assert task.splits.rule == row["split_rule"]
    sizes = dict(part.split("=") for part in row["hf_split_sizes"].split("; "))
    named = task.source.splits or {split: split for split in sizes}
    expected = {ours: int(sizes[theirs]) for ours, theirs in named.items()}
    assert task.splits.published == expected


def _tables(task: Task) -> Tables:
    """Rows as many as published; what they say does not matter."""
    assert task.splits is not None
    row = dict.fromkeys(task.fields, "1") | {task.splits.order or "order": 0}
    splits = {split: (Row(row, split),) * count for split, count in task.splits.published.items()}
    return Tables(splits, "published", "complete", "0")


# How many rows remain of those whose row filter makes the counts unknown.
FILTERED = {"hatexplain", "health_fact", "circa", "sciq", "wiki_bio", "acronym_identification"}


@pytest.mark.parametrize("name", [name for name in IDS if name not in FILTERED])
def test_faithful_cuts_the_counts_of_the_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, row = TASKS[name], task_row(name)
    example = Example("a", ("b",), (), None, "0")
    monkeypatch.setattr(Task, "example", lambda task, row: example)
    tables = _tables(task)
    if name == "hate_speech18":
        kept = dict(tables.splits["train"][0].values) | {"label": 0}
        left_out = kept | {"label": 3}
        rows = (Row(kept, "a"),) * 10703 + (Row(left_out, "b"),) * 241
        tables = Tables({"train": rows}, "published", "complete", "0")
    splits = cut(task, tables, "faithful")
    found = [len(splits.train), len(splits.validation), len(splits.test)]
    assert found == [int(row[f"n_{split}"]) for split in ("train", "validation", "test")]


def test_the_records_whose_counts_are_unknown() -> None:
    assert {row["task_id"] for row in tasks() if not row["n_train"]} == FILTERED
    assert all(TASKS[name].keep for name in FILTERED)


def test_rows_that_the_record_does_not_keep_are_left_out_before_the_cut(data: Path) -> None:
    row = task_row("acronym_identification")
    splits = TASKS["acronym_identification"].load(data, "faithful")
    assert len(splits.validation) == int(row["n_validation"])
    assert len(splits.test) == int(row["n_test"])


def test_a_class_of_the_source_that_several_share_a_word_with() -> None:
    # The hub calls them COARSE:fine, in this order; the coarse ones are those of trec.
    task, coarse = TASKS["trec_finegrained"], TASKS["trec"]
    sizes = {"ABBR": 2, "ENTY": 22, "DESC": 4, "HUM": 4, "LOC": 5, "NUM": 13}
    assert tuple(sizes) == coarse.source_labels
    assert len(task.source_labels) == sum(sizes.values())
    words = [task.example(Row({"text": "a", "fine_label": i}, "x")).targets[0] for i in range(50)]
    assert [words[i] for i in (1, 13, 27, 31, 35, 45)] == [
        "exp", "other", "reason", "desc", "other", "perc",
    ]  # fmt: skip
    assert len(set(words)) == 47
