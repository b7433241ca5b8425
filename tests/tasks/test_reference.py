"""The reference tables, and our records against them."""

from __future__ import annotations

import re

import pytest

from deltatune.core.errors import UnknownNameError
from deltatune.tasks import TASKS
from deltatune.tasks.example import Row, Tables
from deltatune.tasks.reference import manual_templates, table1, task_row, tasks
from deltatune.tasks.specification import HubSpecification
from deltatune.tasks.splits import cut
from deltatune.tasks.task import Task

OURS = [name for name in TASKS if name in {row["task_id"] for row in tasks()}]

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


def _jinja(template: str) -> str:
    """The notation of tasks.csv in jinja."""
    return re.sub(r"\{([^}|]+)(\|[^}]+)?\}", _expression, template)


def _expression(found: re.Match[str]) -> str:
    parts = [found.group(1), *(found.group(2) or "").split("|")[1:]]
    return "{{ " + " | ".join(parts) + " }}"


def _target(row: dict[str, str]) -> str | None:
    return {"field summary, cleaned": "{{ summary | clean }}"}.get(row["target"])


@pytest.mark.parametrize("name", OURS)
def test_a_record_agrees_with_its_row(name: str) -> None:
    task, row = TASKS[name], task_row(name)
    assert task.template == _jinja(row["source_template"])
    assert "|".join(task.labels) == row["label_words"]
    assert task.target == _target(row)
    assert task.metric == row["metric"]
    assert task.kind == row["task_type"]
    assert task.title == row["name"]
    assert task.provenance.category == row["category"]
    assert task.provenance.crossfit == row["crossfit_id"]
    assert task.lengths.source == int(row["src_len_hint"])
    assert task.lengths.target == int(row["tgt_len_hint"])
    assert isinstance(task.source, HubSpecification)
    if name not in COPIED:
        assert task.source.dataset == row["hub_id_now"]
        assert row["hf_config"] in (task.source.config, "")


@pytest.mark.parametrize("name", OURS)
def test_a_split_rule_agrees_with_its_row(name: str) -> None:
    task, row = TASKS[name], task_row(name)
    assert task.splits is not None
    assert task.splits.rule == row["split_rule"]
    sizes = dict(part.split("=") for part in row["hf_split_sizes"].split("; "))
    assert task.splits.published == {split: int(count) for split, count in sizes.items()}


def _published(task: Task) -> Tables:
    """Rows as many as published; what they say does not matter."""
    assert task.splits is not None
    values = dict.fromkeys(task.fields, "1") | {"pair_id": 0}
    splits = {
        split: tuple(Row(values, f"{split}:{i}") for i in range(count))
        for split, count in task.splits.published.items()
    }
    return Tables(splits, "published", "complete", "0")


@pytest.mark.parametrize("name", [n for n in OURS if int(task_row(n)["n_train"]) < 20_000])
def test_faithful_cuts_the_counts_of_the_row(name: str) -> None:
    row = task_row(name)
    splits = cut(TASKS[name], _published(TASKS[name]), "faithful")
    found = [len(splits.train), len(splits.validation), len(splits.test)]
    assert found == [int(row[f"n_{split}"]) for split in ("train", "validation", "test")]
