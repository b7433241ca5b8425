from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.tasks import TASKS, find_task, known_tasks
from deltatune.tasks.records import load_records
from deltatune.tasks.reference import tasks

WANTED = {
    *(row["task_id"] for row in tasks()),
    *("glue_stsb", "docstring_package", "docstring_match", "docstring_name", "minimal_pairs"),
}


def _write(folder: Path, content: object, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_catalog() -> None:
    assert set(TASKS) == WANTED


def test_a_record_that_changes_changes_its_version() -> None:
    # records.json holds (version, digest) of each record. A record whose digest is new must have a
    # higher version than the one that stands there; then the file is written anew.
    kept = json.loads((Path(__file__).parent / "records.json").read_text("utf-8"))
    assert {name: [task.version, task.digest] for name, task in TASKS.items()} == kept


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'glue_rte'"):
        find_task("glue-rte")


def test_one_file_adds_a_task(
    tmp_path: Path, record: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path, record)
    assert find_task("toy", [tmp_path]).title == "TOY"
    assert find_task(path).title == "TOY"
    monkeypatch.setenv("DELTATUNE_TASKS", str(tmp_path))
    assert find_task("toy").title == "TOY"
    assert set(known_tasks([tmp_path])) == WANTED | {"toy"}


def test_shared_parts_are_merged(tmp_path: Path, record: dict[str, object]) -> None:
    name = record.pop("name")
    source = {"dataset": "nobody/other"}
    content = {"shared": record, "tasks": [{"name": name}, {"name": "two", "source": source}]}
    one, two = load_records(_write(tmp_path, content))
    assert (one.name, two.name) == ("toy", "two")
    assert two.source.model_dump()["dataset"] == "nobody/other"
    assert two.labels == one.labels
    with pytest.raises(ConfigurationError, match="expected one record, found 2"):
        find_task(tmp_path / "mine.yaml")


def test_two_records_of_one_name(tmp_path: Path, record: dict[str, object]) -> None:
    _write(tmp_path, record | {"name": "trec"})
    with pytest.raises(ConfigurationError, match="'trec' exists already"):
        find_task("trec", [tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lables": []}, "no key 'lables'. Did you mean 'labels'"),
        ({"lengths": {"sorce": 4}}, "no key 'sorce'. Did you mean 'source'"),
        ({"source": {"kind": "hub", "dataset": "a", "confg": "b"}}, "Did you mean 'config'"),
        ({"source": {"kind": "hubb"}}, "hubb"),
        ({"metric": "F1"}, "metric"),
        ({"template": "{{ text | strp }}"}, "Did you mean 'strip'"),
        ({"version": None}, "version"),
    ],
)
def test_mistakes_in_a_record_name_file_and_task(
    tmp_path: Path, record: dict[str, object], change: dict[str, object], message: str
) -> None:
    path = _write(tmp_path, record | change)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_records(path)
    assert str(path) in str(caught.value)
    assert "'toy'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- a", "expected a record"), ("task: []\ntasks: []", "no key 'task'")],
)
def test_files_that_are_no_records(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        known_tasks([tmp_path])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such folder"):
        known_tasks([tmp_path / "none"])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        find_task(tmp_path / "none.yaml")


def test_files_of_a_record_lie_beside_it(tmp_path: Path, record: dict[str, object]) -> None:
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(60)), encoding="utf-8"
    )
    _write(tmp_path, record | {"source": {"kind": "files", "path": "train.csv"}})
    splits = find_task("toy", [tmp_path]).load()
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 60


def test_a_data_file_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "My Reviews.csv"
    path.write_text("text,label\na,yes\nb,no\n", encoding="utf-8")
    assert find_task(path).name == "my_reviews"


def test_importing_tasks_imports_no_model_library() -> None:
    heavy = ["torch", "transformers", "sklearn", "scipy", "datasets", "pandas", "numpy"]
    code = f"import sys, deltatune.tasks.records; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
