from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tests.training.standin import StandIn, collate, make_rows, quick

from deltatune.core.errors import ArtefactError, ConfigurationError, TrainingError
from deltatune.training import Steps, checkpoint, fit
from deltatune.training.checkpoint import Checkpoint, Store

IDENTITY = {"budget": "3 steps", "rows": 4}


def a_checkpoint(value: float = 1.0) -> Checkpoint:
    shared = torch.full((2, 3), value)
    tensors = {"trained/a": shared, "trained/tied": shared, "trained/view": shared.t()[1:]}
    return Checkpoint(IDENTITY, {"step": 3, "loss": 0.1}, tensors)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, written = Store(tmp_path), a_checkpoint()
    assert store.read(IDENTITY) is None
    store.write(written)
    found = store.read(IDENTITY)
    assert found is not None
    assert found.record == written.record
    assert found.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_checkpoint_is_refused(keep: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(a_checkpoint())
    store.path.write_bytes(store.path.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match=r"not a whole checkpoint.*Delete it"):
        store.read(IDENTITY)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save_file({"a": torch.zeros(1)}, store.path)
    with pytest.raises(ArtefactError, match="not a whole checkpoint"):
        store.read(IDENTITY)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_VERSION", 99)
    Store(tmp_path).write(a_checkpoint())
    monkeypatch.undo()
    with pytest.raises(ArtefactError, match="version 99; this is version 1"):
        Store(tmp_path).read(IDENTITY)


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    Store(tmp_path).write(a_checkpoint())
    with pytest.raises(ArtefactError, match=r"rows was 4 and is now 5\. "):
        Store(tmp_path).read({**IDENTITY, "rows": 5})


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")]
)
def test_a_full_disk_leaves_the_checkpoint_before(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write(a_checkpoint(1.0))

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match=r"No space left.*is whole.*Free space"):
        store.write(a_checkpoint(2.0))
    found = store.read(IDENTITY)
    assert found is not None and float(found.tensors["trained/a"][0, 0]) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_disk_that_is_full_is_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = StandIn()
    with pytest.raises(TrainingError, match="No space left"):
        fit(run, make_rows(4), collate, settings=quick(), budget=Steps(2), folder=tmp_path)
    assert run.steps == []


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_is_refused_before_training(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    run = StandIn()
    with pytest.raises(ConfigurationError, match=r"cannot be written.*Choose another"):
        fit(run, make_rows(4), collate, settings=quick(), budget=Steps(2), folder=tmp_path / place)
    assert run.steps == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to the superuser")
def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        fit(StandIn(), make_rows(4), collate, settings=quick(), budget=Steps(2), folder=tmp_path)
    tmp_path.chmod(0o700)
