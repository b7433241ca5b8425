"""Every task of Table 1 whose rows are here: read, shown, cut."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltatune.core.errors import DataError
from deltatune.tasks import TASKS
from deltatune.tasks.example import Tables
from deltatune.tasks.reference import tasks
from deltatune.tasks.sources.folder import FolderSource
from deltatune.tasks.sources.reading import read_rows
from deltatune.tasks.specification import HubSpecification
from deltatune.tasks.task import Task
from deltatune.tasks.text import normalise

IDS = [row["task_id"] for row in tasks()]
MOST = 300  # rows of a split that are shown and cut, where labels are few; all are read

# Complete in their own way: another release or another count than the hub's.
OTHER_SIZES = {
    "samsum": {14731},  # one row less
    "sick": {4500, 500, 4927},  # the release of SemEval 2014
    "tweet_eval_sentiment": {47460},  # train made anew from the files of SemEval
    "lama_google_re": {5528},
    "glue_mrpc": {3576, 500},  # another validation split, out of the same 4076 rows
}


@dataclass(frozen=True)
class _Head:
    """The first rows of what a folder holds."""

    folder: FolderSource

    def read(self, task: Task) -> Tables:
        tables = self.folder.read(task)
        most = MOST if len(task.labels) < 20 else None
        splits = {name: rows[:most] for name, rows in tables.splits.items()}
        return dataclasses.replace(tables, splits=splits)


def _flat(text: str) -> str:
    return re.sub(r"[\n\r\t]", " ", text)


@pytest.mark.parametrize("name", IDS)
def test_a_task_loads(name: str, data: Path) -> None:
    task = TASKS[name]
    if FolderSource(data).folder_of(task) is None:
        pytest.skip(f"no rows of {name} at {data}")
    splits = task.load(_Head(FolderSource(data)))
    parts = (splits.train, splits.validation, splits.test)
    seen = [{normalise(example.source) for example in part} for part in parts]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    for example in (*splits.train, *splits.validation, *splits.test):
        assert example.source.strip()
        assert all(target.strip() for target in example.targets)
        assert bool(example.texts) == (example.label is not None) == task.has_head
    if task.provenance.category.endswith("multiple-choice question answering"):
        for example in splits.test:
            assert f") {_flat(example.targets[0])}" in example.source
    if task.kind == "generation":
        assert len({example.targets for example in splits.test}) > 5
    else:
        # A table of mixed up indices would leave a word without rows, or no word with any.
        used = {example.targets[0] for part in parts for example in part}
        assert used == set(task.labels)


def test_the_folder_is_what_was_published(data: Path) -> None:
    manifest = {str(row.values["task_id"]): row.values for row in read_rows(data / "MANIFEST.csv")}
    for name in IDS:
        entry = manifest.get(name)
        if entry is None or entry["status"] != "complete":
            continue
        rule = TASKS[name].splits
        assert rule is not None
        sizes = {int(size) for size in re.findall(r"\d+", str(entry["original_rows"]))}
        assert sizes - {*rule.published.values()} == OTHER_SIZES.get(name, set()), name


def test_without_rows_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.delenv("DELTATUNE_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    task = TASKS["poem_sentiment"]
    assert isinstance(task.source, HubSpecification)
    with pytest.raises(DataError, match=f"{task.source.dataset} cannot be read.*DELTATUNE_DATA"):
        task.load()
