"""Every reader of something foreign, given anything: a value, or one of our own errors."""

from __future__ import annotations

import gzip
import json
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzzing import engine
from tests.fuzzing.engine import crash_of, execute, limited, stored, tree_from
from tests.fuzzing.mutations import Tree
from tests.fuzzing.readers import READERS, Reader

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


@EASY  # the first call imports every method
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


@EASY
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


# --- files and folders: `make fuzz` gives each reader a share of a million


@pytest.fixture
def bounded() -> Any:
    with limited():
        yield


@pytest.mark.filterwarnings("ignore")  # methods and PEFT warn of what a file says
@pytest.mark.parametrize("name", sorted(READERS))
def test_readers_take_what_is_sound_and_refuse_the_rest(name: str, bounded: None) -> None:
    reader = READERS[name]
    for tree in reader.examples():
        assert crash_of(reader, tree) is None
    found = execute(reader, 0, 60, seed=1, kept=None)
    assert found.crashes == {} and found.accepted < found.executions + (name == "hub")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent / "fuzzed").glob("*.json")), ids=lambda path: path.stem
)
def test_what_once_went_wrong_goes_right(path: Path, bounded: None) -> None:
    held = json.loads(path.read_text())
    try:
        error = crash_of(READERS[held["reader"]], tree_from(held["tree"]))
    except DeltatuneError as refused:
        assert len(str(refused)) > 20
    else:
        assert error is None, held["was"]


def example() -> list[Tree]:
    return [{"a.json": b'{"a": 1}'}]


def outside(folder: Path) -> None:
    (folder.parent / "outside" / "new").write_text("")


WRONG: dict[str, Callable[[Path], object]] = {
    "KeyError": lambda folder: {}["none"],
    "MemoryError|RuntimeError": lambda folder: bytearray(2**45),
    "Forbidden .*": outside,
    "Forbidden": lambda folder: socket.create_connection(("localhost", 9)),
    "Forbidden|ModuleNotFoundError": lambda folder: __import__("canary"),
    "Forbidden ": lambda folder: time.sleep(5),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_reader_that_is_wrong_is_found_and_kept(
    kind: str, tmp_path: Path, bounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SECONDS", 0.5)
    reader = Reader("wrong", example, 1.0, read=WRONG[kind])
    found = execute(reader, 0, 2, seed=0, kept=tmp_path)
    (said,) = found.crashes
    assert found.crashes[said] == 2 and any(one in said for one in kind.rstrip(" .*").split("|"))
    (path,) = tmp_path.iterdir()
    held = json.loads(path.read_text())
    tree = tree_from(held["tree"])
    assert stored(tree) == held["tree"] and held["reader"] == "wrong"


def test_a_seed_says_what_is_given() -> None:
    for reader in READERS.values():
        examples = reader.examples()
        for number in range(20):
            made = [reader.spoil(examples[0], random.Random(number)) for _ in range(2)]
            assert made[0] == made[1]
