from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from deltatune.core.errors import DataError
from deltatune.tasks.sources import open_source
from deltatune.tasks.sources.folder import FolderSource
from deltatune.tasks.task import Task


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the toy task and a manifest that marks it as a proxy."""
    sums = {}
    for split in ("train", "validation", "test"):
        path = tmp_path / "toy" / f"{split}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(4)]
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        sums[split] = hashlib.sha256(path.read_bytes()).hexdigest()
    header = "task_id,status,published_rows,split_note,source_repo," + ",".join(
        f"sha256_{split}" for split in sums
    )
    line = "toy,proxy,9/9/9,made up,some/where," + ",".join(sums.values())
    (tmp_path / "MANIFEST.csv").write_text(f"{header}\n{line}\n", encoding="utf-8")
    return tmp_path


def test_rows_and_status(root: Path, toy: Task) -> None:
    tables = FolderSource(root).read(toy)
    assert {name: len(rows) for name, rows in tables.splits.items()} == {
        "train": 4,
        "validation": 4,
        "test": 4,
    }
    assert tables.status == "proxy"
    assert tables.notes == (
        "The data is marked 'proxy' (published rows: 9/9/9).",
        "Splits: made up.",
    )
    splits = toy.load(root)
    assert (splits.status, splits.train[1].targets) == ("proxy", ("good",))


def test_a_file_that_is_not_the_one_described(root: Path, toy: Task) -> None:
    path = root / "toy" / "test.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "other", "label": 0}'))
    with pytest.raises(DataError, match=r"test.jsonl.gz: the file is not the one"):
        toy.load(root)


def test_rows_of_another_task(
    root: Path, record: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Task.model_validate(record | {"name": "other", "rows_of": "toy"})
    splits = other.load(root)
    assert splits.notes[0] == "Rows of the folder toy." and splits.status == "proxy"
    monkeypatch.setenv("DELTATUNE_DATA", str(root))
    assert other.load().digest == splits.digest
    (root / "other").mkdir()
    with pytest.raises(DataError, match="no task folder 'other'"):
        other.load()


def test_a_folder_without_manifest(root: Path, toy: Task) -> None:
    (root / "MANIFEST.csv").unlink()
    assert toy.load(root).status == "local"


def test_a_manifest_of_another_kind(root: Path, toy: Task) -> None:
    (root / "MANIFEST.csv").write_text("task\ntoy\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"MANIFEST.csv:1: there is no column 'task_id'"):
        toy.load(root)


def test_what_is_missing(root: Path, toy: Task, record: dict[str, object]) -> None:
    other = Task.model_validate(record | {"name": "toys"})
    with pytest.raises(DataError, match="Did you mean 'toy'"):
        other.load(root)
    (root / "toy" / "test.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"no test.jsonl.gz"):
        toy.load(root)
    with pytest.raises(DataError, match="no such folder"):
        toy.load(root / "none")


def test_a_broken_line(root: Path, toy: Task) -> None:
    (root / "MANIFEST.csv").unlink()
    (root / "toy" / "train.jsonl.gz").unlink()
    (root / "toy" / "train.jsonl").write_text('{"text": "a", "label": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl:1: the label 3 is not one of"):
        toy.load(root)


def test_the_environment_names_the_folder(
    root: Path, toy: Task, record: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTATUNE_DATA", str(root))
    assert isinstance(open_source(toy), FolderSource)
    assert not isinstance(open_source(toy, "hub"), FolderSource)
    other = Task.model_validate(record | {"name": "other"})
    assert not isinstance(open_source(other), FolderSource)
    assert open_source(toy, FolderSource(root)) == FolderSource(root)


def test_real_data(data: Path) -> None:
    assert {"glue_sst2", "samsum"} <= set(FolderSource(data).tasks())
