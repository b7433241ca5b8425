"""Every reader of something foreign, given anything: a value, or one of our own errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltatune.core.errors import DeltatuneError
from deltatune.core.grammar import parse
from deltatune.core.target import find_sites
from deltatune.tasks.records import load_records
from deltatune.tasks.sources.files import task_from_files
from deltatune.tasks.sources.reading import read_rows
from deltatune.testing.families import FAMILIES
from deltatune.training.budget import parse as parse_budget

EASY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.sampled_from(
    [
        "lora",
        "adapter",
        "(",
        ")",
        ",",
        "=",
        "+",
        "rank",
        "4",
        "-1",
        "1e400",
        "'x'",
        '"',
        "at",
        "None",
        "True",
        "[",
        "]",
        "{",
        "}",
        "\\",
        "é",
        "🙂",
        "attention.q",
        "|",
        "re:(",
        "block[",
        "::",
    ]
)
MODEL = FAMILIES["llama"].build()


@given(st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=14).map("".join)))
def test_method_expressions(text: str) -> None:
    try:
        expression = parse(text)
    except DeltatuneError:
        return
    assert parse(str(expression)) == expression


@EASY
@given(st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=8).map("".join)))
def test_targets(text: str) -> None:
    try:
        assert find_sites(MODEL, text, "weight")
    except DeltatuneError:
        return


@given(
    st.one_of(st.text(max_size=30), st.from_regex(r"-?[\d.e]{1,20} ?[a-z]{0,9}", fullmatch=True))
)
def test_budgets(text: str) -> None:
    try:
        budget = parse_budget(text)
    except DeltatuneError:
        return
    assert parse_budget(str(budget)) == budget


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
RECORD: dict[str, Any] = {
    "name": "mine",
    "version": 1,
    "title": "Mine",
    "kind": "classification",
    "metric": "ACC",
    "provenance": {"category": "User", "paper": "none", "licence": "none"},
    "source": {"kind": "files", "path": "rows.csv"},
    "fields": ["text", "label"],
    "template": "{{ text }}",
    "texts": ["{{ text }}"],
    "label": "label",
    "labels": ["a", "b"],
}


def test_the_record_that_is_spoilt_is_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECORD))
    assert load_records(path)[0].labels == ("a", "b")


@EASY
@given(data=st.data())
def test_task_records(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "mine.yaml"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(st.binary(max_size=200)))
    else:
        spoilt = {**RECORD, data.draw(st.sampled_from(sorted(RECORD))): data.draw(JSON)}
        shape = data.draw(st.sampled_from(["record", "list", "shared"]))
        content: Any = {"record": spoilt, "list": {"tasks": [spoilt]}, "shared": {"shared": spoilt}}
        path.write_text(yaml.safe_dump(content[shape], allow_unicode=True))
    try:
        load_records(path)
    except DeltatuneError as error:
        assert "mine.yaml" in str(error)


@EASY
@given(data=st.data())
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "jsonl.gz", "parquet"])
def test_data_files(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    path = tmp_path / f"mine.{ending}"
    rows = data.draw(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=3))
    written = "\n".join(json.dumps(row) for row in rows).encode()
    content = data.draw(st.sampled_from([written, gzip.compress(written)]) | st.binary(max_size=80))
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        for row in read_rows(path):
            assert row.where
        task_from_files(path).load()
    except DeltatuneError as error:
        assert "mine" in str(error)
