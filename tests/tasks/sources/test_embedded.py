from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.core.errors import UnknownNameError
from deltatune.tasks import embedded, find_task
from deltatune.tasks.embedded import BUILDERS, Builder
from deltatune.tasks.embedded.builder import Built
from deltatune.tasks.sources.embedded import EmbeddedSource
from deltatune.tasks.task import Task


class _Counting:
    """A builder that counts how often it builds."""

    def __init__(self) -> None:
        self.times, self.version = 0, "1.0"

    def build(self) -> Built:
        self.times += 1
        rows = [{"text": f"{i}", "label": i % 2} for i in range(9)]
        return {"train": rows[:5], "validation": rows[5:7], "test": rows[7:]}


@pytest.fixture
def counting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: dict[str, object]
) -> tuple[_Counting, Task]:
    """A counting builder and a task over it."""
    counter = _Counting()
    builders = {"counting": Builder(1, lambda: f"library {counter.version}", counter.build)}
    monkeypatch.setattr(embedded, "BUILDERS", builders)
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    source = {"kind": "embedded", "builder": "counting"}
    return counter, Task.model_validate(record | {"source": source})


def test_rows_are_kept_for_the_same_versions(counting: tuple[_Counting, Task]) -> None:
    counter, task = counting
    first = task.load()
    assert first.notes == ("Made from library 1.0.",)
    assert (first.status, len(first.train)) == ("generated", 5)
    assert task.load().digest == first.digest and counter.times == 1
    counter.version = "2.0"
    assert task.load().notes == ("Made from library 2.0.",)
    assert counter.times == 2


@pytest.mark.parametrize("damage", ["", "{", '{"digest": "0", "rows": {}}', "[]"])
def test_a_damaged_copy_is_built_anew(
    counting: tuple[_Counting, Task], tmp_path: Path, damage: str
) -> None:
    counter, task = counting
    digest = task.load().digest
    (kept,) = (tmp_path / "cache" / "embedded").iterdir()
    kept.write_text(damage, encoding="utf-8")
    assert task.load().digest == digest and counter.times == 2
    assert task.load().digest == digest and counter.times == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    counting: tuple[_Counting, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, task = counting
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "file"))
    assert len(task.load().train) == 5
    assert len(task.load().train) == 5 and counter.times == 2


def test_an_unknown_builder() -> None:
    with pytest.raises(UnknownNameError, match="'docstring_name'"):
        EmbeddedSource("docstring_names").read(find_task("docstring_name"))
    assert set(BUILDERS) == {
        "docstring_package",
        "docstring_match",
        "docstring_name",
        "minimal_pairs",
    }
