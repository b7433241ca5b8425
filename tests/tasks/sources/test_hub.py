"""The hub, through a dataset folder and a cache of the hub that the tests make. No network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltatune.core.errors import DataError, UnsupportedError
from deltatune.tasks.task import Task

datasets = pytest.importorskip("datasets")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no cache of the developer's."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def _dataset(folder: Path, splits: tuple[str, ...] = ("train", "validation", "test")) -> Path:
    folder.mkdir(parents=True)
    for split in splits:
        rows = [{"text": f"{split} {i}", "label": i % 2, "more": 1} for i in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def _task(record: dict[str, object], dataset: str, **changes: object) -> Task:
    return Task.model_validate(record | {"source": {"kind": "hub", "dataset": dataset, **changes}})


def test_a_dataset_folder(tmp_path: Path, record: dict[str, object]) -> None:
    task = _task(record, str(_dataset(tmp_path / "data")))
    splits = task.load("hub")
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [4, 4, 4]
    assert splits.train[1].targets == ("good",)
    assert splits.status == "complete"
    assert "revision local, content " in splits.notes[0]
    assert task.load("hub").notes == splits.notes


def test_splits_of_other_names(tmp_path: Path, record: dict[str, object]) -> None:
    place = str(_dataset(tmp_path / "data"))
    named = {"train": "test", "validation": "validation", "test": "train"}
    splits = _task(record, place, splits=named).load("hub")
    assert splits.train[0].texts == ("test 0",)
    assert splits.test[0].texts == ("train 0",)
    with pytest.raises(DataError, match=r"no split 'tests'\. Did you mean 'test'"):
        _task(record, place, splits={"train": "tests"}).load("hub")


def test_the_hubs_cache_at_its_commit(tmp_path: Path, record: dict[str, object]) -> None:
    repository = tmp_path / "hub" / "datasets--nobody--toy"
    _dataset(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for pinned in (None, COMMIT):
        splits = _task(record, "nobody/toy", revision=pinned).load("hub")
        assert len(splits.train) == 4
        assert f"revision {COMMIT}" in splits.notes[0]


def test_the_column_of_the_published_order_is_kept(
    tmp_path: Path, record: dict[str, object]
) -> None:
    path = str(_dataset(tmp_path / "data", ("train", "test")))
    rule = {"rule": "D", "pool": "test", "published": {"train": 4, "test": 4}}
    kept = _task(record | {"splits": rule | {"order": "more"}}, path).load("hub", "faithful")
    assert [len(kept.train), len(kept.validation), len(kept.test)] == [4, 2, 2]
    with pytest.raises(DataError, match="no column 'mor'"):
        _task(record | {"splits": rule | {"order": "mor"}}, path).load("hub", "faithful")


def test_a_dataset_that_cannot_be_had(record: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"nobody/none cannot be read.*DELTATUNE_DATA"):
        _task(record, "nobody/none").load("hub")


def test_a_column_that_is_not_there(tmp_path: Path, record: dict[str, object]) -> None:
    path = str(_dataset(tmp_path / "data"))
    task = _task(
        record | {"fields": ["texts", "label"], "template": "{{ texts }}", "texts": []}, path
    )
    with pytest.raises(DataError, match=r"no column 'texts'. Did you mean 'text'"):
        task.load("hub")


def test_the_extra_is_named(record: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"deltatune\[data\]"):
        _task(record, "nobody/none").load("hub")


def test_loading_a_folder_imports_no_datasets() -> None:
    code = "import sys, deltatune.tasks.sources.hub; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
