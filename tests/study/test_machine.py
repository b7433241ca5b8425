"""What a result was computed on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deltatune.study import machine as module
from deltatune.study.machine import machine, processor


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the system's files are looked for."""
    monkeypatch.setattr(module, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(module, "GPUS", tmp_path / "gpus")
    for one in (processor, machine):
        one.cache_clear()
    yield tmp_path
    for one in (processor, machine):
        one.cache_clear()


def test_a_machine_has_a_processor_cores_and_memory(files: Path) -> None:
    (files / "cpuinfo").write_text("flags : a b\nmodel name\t: Fast: 9000\nmodel name : Other\n")
    name, cores, memory = machine("cpu").split(", ")
    assert name == "Fast: 9000"
    assert cores.endswith(" cores") and memory.endswith(" GiB")


def test_its_gpus_are_said_where_one_was_used(files: Path) -> None:
    for number, name in enumerate(("Large", "Large", "Small")):
        folder = files / "gpus" / str(number)
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t {name}\nIRQ: 1\n")
    assert machine("cuda:0").endswith(", Large, Small")
    assert "Large" not in machine("cpu")


def test_a_system_without_such_files_says_its_architecture(files: Path) -> None:
    assert processor()
    assert machine("cuda:0") == machine("cpu")
