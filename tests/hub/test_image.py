"""The OCI layout: what others read of it, and what they may have written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.hub.killing import play

from deltatune.core.artefact import CARD, FILES, read
from deltatune.core.errors import ArtefactError, UnknownNameError, UnsupportedError
from deltatune.hub import Hub

FOREIGN = {
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "digest": "sha256:" + "a" * 64,
    "size": 7,
    "annotations": {"org.opencontainers.image.ref.name": "busybox:latest"},
    "platform": {"os": "linux", "architecture": "amd64"},
}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def image(layout: Path, tmp_path: Path) -> Hub:
    return Hub(f"oci:{layout}", store=tmp_path / "store")


def index(layout: Path) -> dict[str, Any]:
    return json.loads((layout / "index.json").read_text())  # type: ignore[no-any-return]


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def rewritten(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another manifest, of somebody who can compute digests."""
    held = index(layout)
    (one,) = held["manifests"]
    manifest = json.loads(blob(layout, one["digest"]).read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    one["digest"], one["size"] = f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)
    blob(layout, one["digest"]).write_bytes(content)
    (layout / "index.json").write_text(json.dumps(held))


def test_it_is_an_image_layout(image: Hub, layout: Path, folders: list[Path]) -> None:
    image.push(folders[0], "team/lora:v1")
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    held = index(layout)
    assert held["schemaVersion"] == 2
    (one,) = held["manifests"]
    assert one["annotations"] == {"org.opencontainers.image.ref.name": "team/lora:v1"}
    manifest = json.loads(blob(layout, one["digest"]).read_text())
    assert manifest["artifactType"] == one["artifactType"] != ""
    titles = [each["annotations"]["org.opencontainers.image.title"] for each in manifest["layers"]]
    assert sorted(titles) == sorted((CARD, *FILES))
    for each in (one, manifest["config"], *manifest["layers"]):
        content = blob(layout, each["digest"]).read_bytes()
        assert len(content) == each["size"]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == each["digest"]


def test_what_other_tools_keep_there_stays(image: Hub, layout: Path, folders: list[Path]) -> None:
    layout.mkdir()
    (layout / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [FOREIGN], "annotations": {"a": "b"}})
    )
    image.push(folders[0], "lora")
    image.push(folders[1], "lora")
    held = index(layout)
    assert held["annotations"] == {"a": "b"} and FOREIGN in held["manifests"]
    assert [str(reference) for reference, _ in image.entries()] == ["lora:latest"]
    with pytest.raises(UnknownNameError):
        image.show("busybox:latest")
    before = sorted((layout / "blobs" / "sha256").iterdir())
    assert image.tidy(older=-1) == 0
    assert sorted((layout / "blobs" / "sha256").iterdir()) == before


def test_tidying_takes_what_no_tag_names_once_it_is_old(
    image: Hub, layout: Path, folders: list[Path]
) -> None:
    kept, gone = image.push(folders[0], "kept"), image.push(folders[1], "gone")
    image.push(folders[0], "second")
    image.remove("gone")
    assert image.show(f"gone@sha256:{gone.digest}") == gone
    half = layout / "blobs" / "sha256" / ".part-x"
    half.write_bytes(b"half")
    assert image.tidy() == 0
    old = time.time() - 1e6
    for path in (layout / "blobs" / "sha256").iterdir():
        os.utime(path, (old, old))
    # Manifest, entry, description, tensors, card, and half a file.
    assert image.tidy() == 6 and image.tidy() == 0 and not half.exists()
    with pytest.raises(UnknownNameError):
        image.show(f"gone@sha256:{gone.digest}")
    assert image.verify("kept") == image.verify("second") == kept


def test_what_was_damaged_is_not_handed_out(image: Hub, layout: Path, folders: list[Path]) -> None:
    image.push(folders[0], "lora")
    for path in sorted((layout / "blobs" / "sha256").iterdir()):
        content = path.read_bytes()
        if content == (folders[0] / CARD).read_bytes():
            continue  # which nothing vouches for
        for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
            path.write_bytes(wrong)
            with pytest.raises(ArtefactError):
                image.pull("lora")
        path.unlink()
        with pytest.raises(ArtefactError):
            image.pull("lora")
        path.write_bytes(bytes(len(content)))  # of the same size
        image.push(folders[0], "lora")
        assert path.read_bytes() == content
    assert read(image.pull("lora")).digest == read(folders[0]).digest


def test_manifests_from_anywhere_are_read_with_care(
    image: Hub, layout: Path, folders: list[Path], tmp_path: Path
) -> None:
    image.push(folders[0], "lora")
    title = "org.opencontainers.image.title"

    def named(name: str) -> Callable[[dict[str, Any]], None]:
        def change(manifest: dict[str, Any]) -> None:
            manifest["layers"].append({**manifest["layers"][0], "annotations": {title: name}})

        return change

    for name in ("../../out", "/out", "delta.json/../x", "other.txt"):
        rewritten(layout, named(name))
    place = image.pull("lora")
    assert sorted(path.name for path in place.iterdir()) == sorted((CARD, *FILES))
    assert not (tmp_path / "out").exists()

    def huge(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            if layer["annotations"][title] == CARD:
                layer["size"] = 1 << 40

    rewritten(layout, huge)
    with pytest.raises(ArtefactError, match="more than the"):
        image.verify("lora")
    rewritten(layout, lambda manifest: manifest.pop("layers"))
    with pytest.raises(ArtefactError, match="layers"):
        image.show("lora")
    rewritten(layout, lambda manifest: manifest["config"].update(digest="sha256:../../x"))
    with pytest.raises(ArtefactError, match=r"digest|pattern"):
        image.show("lora")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"schemaVersion": 1}', b'{"manifests": 1}']
)
def test_a_broken_index_is_said(
    image: Hub, layout: Path, folders: list[Path], content: bytes
) -> None:
    image.push(folders[0], "lora")
    (layout / "index.json").write_bytes(content)
    for ask in (lambda: image.pull("lora"), lambda: image.push(folders[1], "lora")):
        with pytest.raises(ArtefactError, match=r"index\.json"):
            ask()
    assert (layout / "index.json").read_bytes() == content


def test_files_for_others_have_no_place_here(image: Hub, folders: list[Path]) -> None:
    with pytest.raises(UnsupportedError, match="hf://owner"):
        image.push(folders[0], "lora", beside=folders[1])


def test_processes_that_are_killed_leave_it_whole(tmp_path: Path) -> None:
    tally = play(tmp_path, processes=3, deltas=12, rounds=4, kind="oci:")
    assert tally.kills == 12 and tally.verified > 12
