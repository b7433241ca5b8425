"""States in memory and in folders: bounded, locked, and never read half written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.training.states import FolderStates, MemoryStates, States

WHOLE = {"weights": "a", "boundary": "block.1"}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int, size: int = 40) -> Tensor:
    return torch.full((size,), number, dtype=torch.uint8)


def opened(folder: Path, capacity: int = 10_000, **changed: str) -> FolderStates:
    return FolderStates(folder, WHOLE | changed, capacity)


def fill(states: States, count: int) -> None:
    for number in range(count):
        states.write(key(number), content(number))


def held(states: States, count: int) -> list[int]:
    """The numbers that can be read, each of which is what was written."""
    found = {number: states.read(key(number)) for number in range(count)}
    for number, value in found.items():
        assert value is None or torch.equal(value, content(number))
    return [number for number, value in found.items() if value is not None]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_fits_is_kept(on_disk: bool, tmp_path: Path) -> None:
    room = 5 * (40 + (48 if on_disk else 0)) + 7
    states: States = opened(tmp_path, room) if on_disk else MemoryStates(room)
    fill(states, 5)
    fill(states, 5)  # once more, which changes nothing
    assert states.full is None
    fill(states, 8)
    assert states.full is not None
    assert "bytes" in states.full
    assert held(states, 8) == [0, 1, 2, 3, 4]
    assert len(states) == 5
    states.close()


def test_trunks_share_the_bound_of_a_folder_and_nothing_else(tmp_path: Path) -> None:
    first = opened(tmp_path, 500)
    fill(first, 3)
    first.close()
    other = opened(tmp_path, 500, weights="b")
    assert held(other, 3) == []
    fill(other, 3)
    assert held(other, 3) == [0, 1]
    other.close()
    again = opened(tmp_path, 500)
    assert held(again, 3) == [0, 1, 2]
    again.close()


def test_a_folder_serves_one_run(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(ConfigurationError, match=f"used by another run, of process {os.getpid()}"):
        opened(tmp_path, weights="b")
    first.close()
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        opened(tmp_path / "file")


def test_a_full_disk_ends_the_keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.pwrite
    for refused in range(6):  # the write that the disk takes half of
        count = 0

        def half(file: int, data: bytes, place: int, refused: int = refused) -> int:
            nonlocal count
            count += 1
            return usual(file, data if count <= refused else data[: len(data) // 2], place)

        monkeypatch.setattr(os, "pwrite", half)
        states = opened(tmp_path / str(refused))
        fill(states, 5)
        assert states.full is not None
        assert "No space left" in states.full
        assert held(states, 5) == list(range(refused // 2))
        states.close()
        monkeypatch.setattr(os, "pwrite", usual)
        states = opened(tmp_path / str(refused))
        assert held(states, 5) == list(range(refused // 2))
        fill(states, 5)
        assert held(states, 5) == list(range(5))
        states.close()


def cut(path: Path, length: int) -> None:
    os.truncate(path, min(length, path.stat().st_size))


@settings(deadline=None, max_examples=30)
@given(index=st.integers(0, 5 * 48), data=st.integers(0, 5 * 40), flipped=st.integers(0, 199))
def test_what_is_damaged_is_not_read(
    index: int, data: int, flipped: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("states")
    states = opened(folder)
    fill(states, 5)
    states.close()
    (place,) = [path for path in folder.iterdir() if path.is_dir()]
    cut(place / "index.bin", index)
    cut(place / "states.bin", data)
    with (place / "states.bin").open("r+b") as file:
        if flipped < data:
            file.seek(flipped)
            byte = file.read(1)[0]
            file.seek(flipped)
            file.write(bytes([byte ^ 1]))
    states = opened(folder)
    whole = min(index // 48, data // 40)
    assert held(states, 5) == [n for n in range(whole) if flipped >= data or n != flipped // 40]
    fill(states, 5)
    assert held(states, 5) == list(range(5))
    states.close()
    states = opened(folder)
    assert held(states, 5) == list(range(5))
    states.close()


WRITE = """
import os, pathlib, signal, sys, torch
from deltatune.training.states import FolderStates
states = FolderStates(pathlib.Path(sys.argv[1]), {"weights": "a", "boundary": "block.1"}, 10_000)
for number in range(3):
    content = torch.full((40,), number, dtype=torch.uint8)
    states.write(number.to_bytes(16, "big"), content)
os.pwrite(states._data, b"half a row", states._end)
print("ready", flush=True)
signal.pause()
"""


def test_a_killed_process_leaves_what_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigurationError, match=f"of process {process.pid}"):
            opened(tmp_path)
        process.kill()
    states = opened(tmp_path)
    assert held(states, 5) == [0, 1, 2]
    fill(states, 5)
    assert held(states, 5) == list(range(5))
    states.close()
