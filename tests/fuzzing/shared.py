"""Examples and readers of what is shared: image layouts, signatures, folders of peers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzzing.mutations import Link, Node, Tree, mutated_folder
from tests.interop.peers import backbone, names, unpacked

from deltatune import api
from deltatune.core.delta import deltas_of
from deltatune.core.errors import DeltatuneError
from deltatune.hub import Hub, check_signed, make_key, sign, signers

__all__ = [
    "Folders",
    "images",
    "read_image",
    "read_signatures",
    "signed_folders",
    "spoilt_image",
    "spoilt_signature",
    "tree_of",
]


def tree_of(folder: Path) -> dict[str, bytes | Link | Node]:
    """The files of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _laid(tree: Tree, folder: Path) -> Path:
    for name, content in tree.items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    return folder


# --- OCI image layouts


def images(artefacts: Sequence[Tree]) -> list[Tree]:
    """A layout of two deltas, with two tags each."""
    with tempfile.TemporaryDirectory() as place:
        hub = Hub(f"oci:{place}/image", store=Path(place) / "store")
        for number, tree in enumerate(artefacts[:2]):
            source = Path(place) / f"{number}"
            source.mkdir()
            hub.push(_laid(tree, source), f"a{number}")
            hub.push(source, f"b/c{number}:v1")
        return [{k: v for k, v in tree_of(Path(place) / "image").items() if k != ".lock"}]


def spoilt_image(tree: Tree, draw: random.Random) -> Tree:
    """Mostly the index, which is read first; then what names blobs, and blobs."""
    blobs = [name for name in tree if name.startswith("blobs/")]
    small = [name for name in blobs if len(tree[name]) < 4000]  # type: ignore[arg-type]
    chosen = draw.choice((["index.json"], ["index.json"], small, blobs))
    made = mutated_folder({name: tree[name] for name in chosen}, draw)
    return {**{name: value for name, value in tree.items() if name not in chosen}, **made}


def read_image(folder: Path) -> None:
    """All that reads, then a removal and `tidy`, which write."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as store:
        hub = Hub(f"oci:{folder}", store=store)
        for reference in ("a0", "b/c1:v1", "a@sha256:" + "0" * 64):
            for step in (hub.pull, hub.show):
                with suppress(DeltatuneError):
                    step(reference)
        for action in (lambda: hub.search("lora"), lambda: hub.remove("a0")):
            with suppress(DeltatuneError):
                action()
        hub.tidy(older=-1)


# --- signatures


def signed_folders(artefacts: Sequence[Tree]) -> list[Tree]:
    """A delta that two people have signed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "delta"
        folder.mkdir()
        _laid(artefacts[0], folder)
        for name in ("one", "two"):
            make_key(Path(place) / name)
            sign(folder, Path(place) / name)
        return [tree_of(folder)]


def spoilt_signature(tree: Tree, draw: random.Random) -> Tree:
    """The signatures, and now and then what they sign."""
    kept = [] if draw.random() < 0.2 else [n for n in tree if not n.endswith(".ed25519")]
    made = mutated_folder({n: v for n, v in tree.items() if n not in kept}, draw)
    return {**{name: tree[name] for name in kept}, **made}


def read_signatures(folder: Path) -> None:
    """All signatures, and those of a key that may have signed."""
    names = [path.stem for path in folder.iterdir() if path.suffix == ".ed25519"]
    for name in names[:2]:
        with suppress(DeltatuneError):
            assert check_signed(folder, [name]) == name
    assert set(signers(folder)) <= set(names)


# --- folders of AdapterHub and OpenDelta


class Folders:
    """The folders of a peer for one family, and a model to read them on."""

    def __init__(self, peer: str, family: str = "bert") -> None:
        self._peer, self._family = peer, family

    def examples(self) -> list[Tree]:
        """Those that are read as something."""
        found = []
        with tempfile.TemporaryDirectory() as place:
            here = unpacked(Path(place))
            for family, name in names(self._peer):
                folder = here / self._peer / family / name
                if family == self._family:
                    with suppress(DeltatuneError):
                        self.read(folder)
                        found.append(tree_of(folder))
        return found

    def read(self, folder: Path) -> None:
        """Reads a folder, pickles too, and takes the delta off again."""
        try:
            api.load(folder, self._model, allow_pickle=True)
        finally:
            for delta in deltas_of(self._model):
                delta.detach()

    @cached_property
    def _model(self) -> Any:
        with tempfile.TemporaryDirectory() as place:
            return backbone(unpacked(Path(place)), self._family)

    @staticmethod
    def spoilt(tree: Tree, draw: random.Random) -> Tree:
        """Half of the time the configuration is left as it is, so that tensors are come to."""
        kept = [name for name in tree if name.endswith(".json")] if draw.random() < 0.5 else []
        made = mutated_folder({n: v for n, v in tree.items() if n not in kept}, draw)
        return {**{name: tree[name] for name in kept}, **made}
