"""A hub in files: what is damaged, broken or left half-way is never handed out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltatune.core.artefact import FILES, read
from deltatune.core.errors import ArtefactError, UnknownNameError
from deltatune.hub import Hub
from deltatune.hub.files import FileShelf
from deltatune.hub.shelf import LARGEST


def shelf(hub: Hub) -> FileShelf:
    assert isinstance(hub.shelf, FileShelf)
    return hub.shelf


def changed(files: Hub, name: str) -> str:
    """The place of a file in the hub whose path ends so."""
    (found,) = [path for path in shelf(files).files.find(shelf(files).root) if path.endswith(name)]
    return str(found)


def test_a_pulled_delta_is_kept_and_needs_the_hub_for_its_tag_alone(
    files: Hub, folders: list[Path]
) -> None:
    files.push(folders[0], "lora")
    place = files.pull("lora")
    shelf(files).files.rm_file(changed(files, FILES[1]))
    assert files.pull("lora") == place
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("file", FILES)
def test_what_was_damaged_is_not_handed_out(files: Hub, folders: list[Path], file: str) -> None:
    files.push(folders[0], "lora")
    path = changed(files, file)
    content = bytearray(shelf(files).files.cat_file(path))
    content[-20] ^= 1
    shelf(files).files.pipe_file(path, bytes(content))
    for ask in (files.pull, files.verify):
        with pytest.raises(ArtefactError):
            ask("lora")
    assert not list(files._store.glob("*"))
    shelf(files).files.pipe_file(path, bytes(content[:-1]))
    with pytest.raises(ArtefactError):
        files.pull("lora")
    shelf(files).files.rm_file(path)
    with pytest.raises(ArtefactError, match="Push it again"):
        files.pull("lora")
    shelf(files).files.pipe_file(path, bytes(content))  # of the same size
    files.push(folders[0], "lora")
    assert read(files.pull("lora")).digest == files.show("lora").digest


def test_an_entry_that_lies_or_is_none_is_found_out(files: Hub, folders: list[Path]) -> None:
    files.push(folders[0], "lora")
    path = changed(files, "@latest.json")
    said = json.loads(shelf(files).files.cat_file(path))
    shelf(files).files.pipe_file(path, json.dumps({**said, "scores": {"accuracy": 1.0}}).encode())
    with pytest.raises(ArtefactError, match="not what its tag says"):
        files.pull("lora")
    wrong = (
        {"more": 1},
        {"digest": "../../names"},
        {"digest": said["digest"] + "\n"},
        {"size": -1},
    )
    changes = [json.dumps({**said, **change}).encode() for change in wrong]
    for content in (b"", b"[]", b"{}", b"\xff", *changes):
        shelf(files).files.pipe_file(path, content)
        with pytest.raises(ArtefactError, match="is broken"):
            files.pull("lora")
    one = json.dumps({**said, "digest": files.push(folders[2], "other").digest}).encode()
    shelf(files).files.pipe_file(path, one)
    with pytest.raises(ArtefactError, match="not what its tag says"):
        files.pull("lora")


def test_a_description_that_is_too_large_is_not_read(
    files: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.push(folders[0], "lora")
    monkeypatch.setitem(LARGEST, FILES[0], 100)
    with pytest.raises(ArtefactError, match="more than a description"):
        files.pull("lora")


def test_files_that_no_push_has_written_are_no_deltas(files: Hub, folders: list[Path]) -> None:
    files.push(folders[0], "lora")
    place = shelf(files).root + "/names/"
    for name in ("Upper/@latest.json", "lora/@Bad.json", "lora/readme.md", "lora/@v1.json.part-1"):
        shelf(files).files.makedirs(shelf(files).files._parent(place + name), exist_ok=True)
        shelf(files).files.pipe_file(place + name, b"x")
    assert [str(reference) for reference, _ in files.entries()] == ["lora:latest"]


def test_tidying_takes_what_no_tag_names_once_it_is_old(files: Hub, folders: list[Path]) -> None:
    kept = files.push(folders[0], "kept")
    gone = files.push(folders[1], "gone")
    files.remove("gone")
    with pytest.raises(UnknownNameError):
        files.remove("gone")
    assert files.show(f"gone@sha256:{gone.digest}") == gone
    left = f"{shelf(files).delta(kept.digest)}/{FILES[1]}.part-123"
    shelf(files).files.pipe_file(left, b"half")
    assert files.tidy() == 0
    assert files.tidy(older=-1) == 4  # three files of the delta, and half a file
    assert files.tidy(older=-1) == 0
    with pytest.raises(UnknownNameError):
        files.show(f"gone@sha256:{gone.digest}")
    assert files.verify("kept") == kept


def test_a_system_that_can_only_be_read_says_so(
    files: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("read-only")

    monkeypatch.setattr(type(shelf(files).files), "put_file", refuse)
    with pytest.raises(ArtefactError, match="cannot be written: read-only"):
        files.push(folders[0], "lora")
    assert list(files.entries()) == []
