"""Files that come from anywhere: what fuzzing found, and what must never be believed."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import nn

from deltatune import api
from deltatune.core.artefact import read, read_listed
from deltatune.core.description import describe
from deltatune.core.errors import ArtefactError, TargetError
from deltatune.core.target import find_sites
from deltatune.core.untrusted import Pattern, content_of, json_of, size_of, tensors_of
from deltatune.hub import Hub
from deltatune.testing.case import move
from deltatune.training.checkpoint import Checkpoint, Store


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "[" * 100_000, "{", "\ud800", "9" * 5000],
    ids=lambda text: text[:10],
)
def test_json_says_one_thing(text: str) -> None:
    with pytest.raises(ValueError):
        json_of(text.encode("utf-8", "surrogatepass"))


def test_a_file_is_a_file_of_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    assert size_of(tmp_path / "link") == 5 and content_of(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        content_of(tmp_path / "a", 4)
    for name in ("pipe", "zeros", "."):
        with pytest.raises(OSError, match="no regular file"):
            content_of(tmp_path / name)
        with pytest.raises(OSError, match="no regular file"):
            tensors_of(tmp_path / name)


def framed(header: str, data: bytes = bytes(16)) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def test_tensors_have_one_name_each_and_a_header_of_a_bounded_size(tmp_path: Path) -> None:
    path, one = tmp_path / "a", '"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'
    path.write_bytes(framed(f"{{{one}}}"))
    with tensors_of(path) as file:
        assert list(file.keys()) == ["a"]
    path.write_bytes(framed(f"{{{one}, {one}}}"))  # safetensors takes the last one
    with pytest.raises(ValueError, match="'a' is there twice"):
        tensors_of(path)
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="header has more than"):
        tensors_of(path)


def saved(folder: Path) -> Path:
    """A delta most of whose numbers are zero."""
    delta = api.attach(nn.Sequential(nn.Linear(80, 80)), "difference(at='0')")
    move(delta)
    values = {name: torch.zeros_like(value) for name, value in delta.tensors().items()}
    delta.bank.write(0, values)
    return Path(api.save(delta, folder))


def resigned(folder: Path, change: Any) -> None:
    """Changes a description as somebody does who wants it to be believed."""
    path = folder / "delta.json"
    held = json.loads(path.read_text())
    held["digest"] = ""
    held["blake3"] = blake3((folder / "delta.safetensors").read_bytes()).hexdigest()
    change(held)
    text = json.dumps(held)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace('"digest": ""', f'"digest": "{digest}"', 1))


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**40]},  # of zeros, which no byte of the file says
        {"shape": [2**62, 4]},
        {"shape": [-80, -80]},
        {"shape": [2**15, 2**15]},
        {"entries": -1},
        {"dtype": "load"},  # torch has it, and it is no type
        {"dtype": "int32"},
    ],
    ids=str,
)
def test_a_small_file_asks_for_no_large_tensor(entry: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "d")
    read_listed(folder, read(folder))
    resigned(folder, lambda held: next(iter(held["tensors"].values())).update(entry))
    with pytest.raises(ArtefactError):
        read_listed(folder, read(folder))


def test_a_description_has_no_key_twice(tmp_path: Path) -> None:
    text = (saved(tmp_path / "d") / "delta.json").read_text()
    twice = text.replace('"method"', '"method": "lora", "method"', 1)
    with pytest.raises(ArtefactError, match="'method' is there twice"):
        describe(twice.encode(), "it")


@pytest.mark.parametrize("name", ["delta.json", "delta.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder"])
def test_what_never_ends_is_no_file_of_a_delta(name: str, kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "d")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "zeros":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(ArtefactError, match="no regular file"):
        read(folder)


@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_what_never_ends_is_no_file_of_a_hub(kind: str, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub", store=tmp_path / "store")
    hub.push(saved(tmp_path / "d"), "a")
    (path,) = (tmp_path / "hub").rglob("@latest.json")
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ArtefactError, match="is no file"):
        hub.pull("a")


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{}",
        "1",
        '{"version": 1, "identity": [], "record": {}}',
        '{"version": 1, "version": 1}',
    ],
)
def test_a_checkpoint_with_another_header_is_refused(header: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(Checkpoint({"seed": 0}, {}, {"a": torch.ones(2)}))
    assert store.read({"seed": 0}) is not None
    save_file({"a": torch.ones(2)}, store.path, {"deltatune": header})
    with pytest.raises(ArtefactError, match=r"not a whole checkpoint|was changed"):
        store.read({"seed": 0})


SLOW = "(a|aa)+"  # on letters and another one it tries every way to divide them


def test_an_expression_that_tries_without_end_is_given_up() -> None:
    pattern, started = Pattern(SLOW), time.monotonic()
    with pytest.raises(ValueError, match="takes too long"):
        pattern.match("a" * 80 + "b")
    assert time.monotonic() - started < 10
    assert pattern.match("aaa") and not pattern.match("b")
    assert pattern.match("aab") is None and pattern.match("aab", whole=False)


@pytest.mark.parametrize("text", ["(", "a**", "(?P<a>.)(?P<a>.)", "[z-a]"])
def test_what_is_no_expression_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        Pattern(text)
    with pytest.raises(TargetError, match="is not a regular expression"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), f"re:{text}", "weight")


def test_a_target_of_a_stranger_does_not_hang() -> None:
    model = nn.Module()
    model.add_module("a" * 80 + "b", nn.Linear(2, 2))
    with pytest.raises(TargetError, match="takes too long"):
        find_sites(model, f"re:{SLOW}", "weight")
