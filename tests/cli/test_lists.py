"""`methods`, `tasks` and `doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune.core.method import METHODS
from deltatune.tasks import TASKS

Call = Callable[..., tuple[int, str, str]]


def test_methods_lists_the_registry(call: Call) -> None:
    _, out, _ = call("methods")
    lines = out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(METHODS)
    _, out, _ = call("methods", "--json")
    found = json.loads(out)
    assert [method["name"] for method in found] == list(METHODS)
    assert all(method["summary"] for method in found)


@pytest.mark.parametrize("name", ["lora", "full", "prompt"])
def test_a_method_is_described_with_its_fields(name: str, call: Call) -> None:
    _, out, _ = call("methods", name)
    assert out.startswith(f"{name}: ") and "  at: str | None = None" in out
    _, out, _ = call("methods", name, "--json")
    assert set(json.loads(out)["fields"]) >= {"at", "dropout"}


def test_tasks_lists_the_records(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_TASKS", raising=False)
    _, out, _ = call("tasks", "--json")
    assert [task["name"] for task in json.loads(out)] == list(TASKS)
    _, out, _ = call("tasks")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(TASKS)


def test_a_task_shows_counts_and_an_example(call: Call) -> None:
    code, out, err = call("tasks", "minimal_pairs")
    assert code == 0, err
    for word in ("category", "rows      train ", "origin", "source    ", "target    "):
        assert word in out
    _, out, _ = call("tasks", "minimal_pairs", "--json")
    found = json.loads(out)
    assert found["rows"]["train"] > 0 and found["source"] and found["targets"]


def test_doctor_names_what_is_there_and_what_is_missing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "glue_rte").mkdir()
    monkeypatch.setenv("DELTATUNE_DATA", str(tmp_path))
    _, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert found["torch"] == torch.__version__
    assert found["task data"] == f"{tmp_path}: 1 of {len(TASKS)} tasks"
    assert set(found["extras"]) == {"data", "study", "minilm", "peft", "quantised", "composition"}
    monkeypatch.delenv("DELTATUNE_DATA")
    _, out, _ = call("doctor", "--data", str(tmp_path / "none"))
    assert "there is no such folder" in out
    assert "set DELTATUNE_DATA" in call("doctor")[1]
