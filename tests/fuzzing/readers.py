"""The readers of files that come from anywhere, with sound examples of what each reads."""

from __future__ import annotations

import hashlib
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from tests.fuzzing.mutations import Link, Node, Tree, mutated_folder, mutated_text
from tests.fuzzing.shared import (
    Folders,
    images,
    read_image,
    read_signatures,
    signed_folders,
    spoilt_image,
    spoilt_signature,
    tree_of,
)
from torch import nn

from deltatune import api, laplace
from deltatune.core.artefact import load, read, read_listed, save
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.description import describe
from deltatune.core.errors import DeltatuneError
from deltatune.core.swap import swap
from deltatune.hub import Hub, Reference
from deltatune.interop import peft
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES
from deltatune.training.checkpoint import Checkpoint, Store

__all__ = ["READERS", "Reader"]

Spoil = Callable[[Tree, random.Random], Tree]
_JSON, _TENSORS = "delta.json", "delta.safetensors"


@dataclass(frozen=True)
class Reader:
    """A reader, and what it is given.

    Attributes:
        name: of the reader.
        examples: makes sound folders for it.
        read: reads a folder; raises DeltatuneError alone. `content`, where it needs no folder,
            takes the one file of the example instead.
        share: of all executions.
        spoil: makes another folder of one.
    """

    name: str
    examples: Callable[[], Sequence[Tree]]
    share: float
    read: Callable[[Path], object] = field(default=lambda folder: folder)
    content: Callable[[bytes], object] | None = None
    spoil: Spoil = mutated_folder


def _llama() -> nn.Module:
    return FAMILIES["llama"].build().requires_grad_(False)


def _written(write: Callable[[Path], object]) -> dict[str, bytes | Link | Node]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return tree_of(Path(folder))


# --- artefacts

_FACTS = {"task": "a", "test": {"ACC": 0.5}, "origin": {"library": "peft"}}
_METHODS = (
    "lora(rank=2)",
    "bitfit + lora(rank=1, at='ffn.up')",
    "vera(rank=2)",
    "prompt(length=2)",
)


def _artefacts() -> list[Tree]:
    """Folders of deltas; one of them has tensors that are mostly zero."""
    found: list[Tree] = []
    for method in (*_METHODS, "sparse"):
        sparse = method == "sparse"
        model = nn.Sequential(nn.Linear(80, 80)) if sparse else _llama()
        delta = api.attach(model, "difference(at='0')" if sparse else method)
        move(delta)
        if sparse:
            chance = torch.Generator().manual_seed(0)
            values = {name: value.clone() for name, value in delta.tensors().items()}
            delta.bank.write(
                0,
                {n: v * (torch.rand(v.shape, generator=chance) < 0.01) for n, v in values.items()},
            )
        found.append(_written(lambda to, delta=delta: save(delta, to / "d", facts=_FACTS)))
    return [{Path(name).name: content for name, content in tree.items()} for tree in found]


def _signed(tree: Tree, draw: random.Random) -> Tree:
    """The same with sizes and digests that fit, as who spoils a file on purpose would make them."""
    text, tensors = tree.get(_JSON), tree.get(_TENSORS)
    if draw.random() < 0.15 or not isinstance(text, bytes):
        return tree
    written = text.decode("utf-8", "surrogateescape")
    if isinstance(tensors, bytes):
        written = re.sub(r'"size": ?\d+', f'"size": {len(tensors)}', written, count=1)
        digest = blake3(tensors).hexdigest()
        written = re.sub(r'"blake3": ?"\w*"', f'"blake3": "{digest}"', written, count=1)
    blank = re.sub(r'"digest": ?"[^"]*"', '"digest": ""', written, count=1)
    own = hashlib.sha256(blank.encode("utf-8", "surrogateescape")).hexdigest()
    written = blank.replace('"digest": ""', f'"digest": "{own}"', 1)
    return {**tree, _JSON: written.encode("utf-8", "surrogateescape")}


def _spoilt_artefact(tree: Tree, draw: random.Random) -> Tree:
    return _signed(mutated_folder(tree, draw), draw)


def _descriptions() -> list[Tree]:
    return [{_JSON: tree[_JSON]} for tree in _artefacts()]


def _spoilt_description(tree: Tree, draw: random.Random) -> Tree:
    made = mutated_folder(tree, draw).get(_JSON)
    return _signed({_JSON: made} if isinstance(made, bytes) else tree, draw)


def _read_listed(folder: Path) -> object:
    return read_listed(folder, read(folder))


class _Model:
    """A model, built when the first reader needs it, and attached deltas taken off after each."""

    def __init__(self, method: str | None = None) -> None:
        self._method = method
        self._model: nn.Module | None = None
        self._delta: Delta | None = None

    def plain(self) -> nn.Module:
        """The model without a delta."""
        self._model = _llama() if self._model is None else self._model
        return self._model

    def delta(self) -> Delta:
        """A delta that stays attached."""
        if self._delta is None:
            assert self._method is not None
            self._delta = api.attach(self.plain(), self._method)
            move(self._delta)
        return self._delta

    def clear(self) -> None:
        """Takes all deltas off."""
        for delta in deltas_of(self.plain()):
            delta.detach()


_BARE, _LORA, _SAME = _Model(), _Model("lora(rank=2)"), _Model("lora(rank=2) + bitfit")


def _load(folder: Path) -> None:
    try:
        load(_BARE.plain(), folder)
    finally:
        _BARE.clear()


def _swap(folder: Path) -> None:
    swap(_LORA.delta(), folder)


# --- hubs

_DIGITS = "0123456789abcdef" * 4


def _hubs() -> list[Tree]:
    def push(folder: Path) -> None:
        for number, tree in enumerate(_artefacts()[:2]):
            with tempfile.TemporaryDirectory() as source:
                for name, content in tree.items():
                    assert isinstance(content, bytes)
                    (Path(source) / name).write_bytes(content)
                hub = Hub(folder, store=Path(source) / "store")
                hub.push(source, f"a{number}")
                hub.push(source, f"b/c{number}:v1")

    return [_written(push)]


def _hub(folder: Path) -> None:
    """All that reads, and `tidy`, which removes."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as store:
        hub = Hub(folder, store=store)
        references = ["a0", "b/c1:v1", f"a@sha256:{_DIGITS}"]
        with suppress(DeltatuneError):
            references += [str(reference) for reference, _ in hub.entries()]
        for step in (hub.pull, hub.verify, hub.show):
            for reference in references[:4]:
                with suppress(DeltatuneError):
                    step(reference)
        for action in (lambda: hub.search("lora"), lambda: hub.tidy(older=-1)):
            with suppress(DeltatuneError):
                action()


def _spoilt_hub(tree: Tree, draw: random.Random) -> Tree:
    """Mostly the entries: they are what is read first."""
    names = [name for name in tree if "/@" in name] if draw.random() < 0.6 else list(tree)
    made = mutated_folder({name: tree[name] for name in names}, draw)
    return {**{name: value for name, value in tree.items() if name not in names}, **made}


def _reference(content: bytes) -> None:
    made = Reference.parse(content.decode("utf-8", "surrogatepass"))
    assert Reference.parse(str(made)) == made
    parts = made.name.split("/")
    assert not {"", ".", ".."} & set(parts) and made.name == made.name.lower()


def _references() -> list[Tree]:
    texts = ("a", "glue/trec-lora:v1", f"a/b@sha256:{_DIGITS}", "a" * 64, "a.b_c-d:0.1")
    return [{"reference": text.encode()} for text in texts]


def _spoilt_text(tree: Tree, draw: random.Random) -> Tree:
    ((name, content),) = tree.items()
    assert isinstance(content, bytes)
    return {name: mutated_text(content.decode(), draw).encode("utf-8", "surrogatepass")}


# --- folders of PEFT

_EXCHANGED = (
    *("lora(rank=2)", "dora(rank=2)", "ia3", "vera(rank=2)", "lokr(rank=2)", "shira(entries=64)"),
    *("oft(block=8)", "ln_tuning", "prompt(length=2)", "prefix(length=2)", "fourierft(entries=9)"),
    *("trainable_tokens(tokens=[3])", "vb_lora(rank=2)", "lora(rank=1) + last_layer"),
)


def _peft_folders() -> list[Tree]:
    found: list[Tree] = []
    for method in _EXCHANGED:
        with suppress(DeltatuneError):  # what this version has no kind for
            delta = api.attach(_llama(), method)
            move(delta)
            found.append(_written(lambda to, delta=delta: peft.write(delta, to / "p")))
    return [{Path(name).name: content for name, content in tree.items()} for tree in found]


def _peft(folder: Path) -> None:
    try:
        peft.read(folder, _BARE.plain())
    finally:
        _BARE.clear()


# --- checkpoints of runs, and posteriors

_IDENTITY = {"settings": {"rate": 0.1, "steps": 10}, "seed": 0}


def _checkpoints() -> list[Tree]:
    tensors = {"a/b": torch.ones(2, 3), "c": torch.arange(4), "d": torch.zeros(0)}
    record: dict[str, Any] = {"step": 3, "losses": [1.0, 0.5], "best": None}
    return [_written(lambda to: Store(to).write(Checkpoint(_IDENTITY, record, tensors)))]


def _checkpoint(folder: Path) -> None:
    Store(folder).read(_IDENTITY)


def _posteriors() -> list[Tree]:
    made: list[Tree] = []
    batch = FAMILIES["llama"].batch()
    for structure in ("kronecker", "diagonal"):
        posterior = laplace.fit(
            _SAME.delta(),
            [batch],
            structure=structure,
            rank=2,
            read=lambda held: held.logits[:, -1],
        )
        made.append(_written(lambda to, made=posterior: made.save(to / "p.safetensors")))
    return made


def _posterior(folder: Path) -> None:
    laplace.load(folder / "p.safetensors", _SAME.delta())


def _describe(content: bytes) -> None:
    describe(content, "the file")


_HUB, _DELTA = Folders("adapterhub"), Folders("opendelta")

READERS = {
    reader.name: reader
    for reader in (
        Reader("description", _descriptions, 0.28, content=_describe, spoil=_spoilt_description),
        Reader("reference", _references, 0.08, content=_reference, spoil=_spoilt_text),
        Reader("tensors", _artefacts, 0.14, read=_read_listed, spoil=_spoilt_artefact),
        Reader("load", lambda: _artefacts()[:4], 0.06, read=_load, spoil=_spoilt_artefact),
        Reader("swap", lambda: _artefacts()[:1], 0.05, read=_swap, spoil=_spoilt_artefact),
        Reader("hub", _hubs, 0.04, read=_hub, spoil=_spoilt_hub),
        Reader("image", lambda: images(_artefacts()), 0.06, read=read_image, spoil=spoilt_image),
        Reader(
            "signature",
            lambda: signed_folders(_artefacts()),
            0.05,
            read=read_signatures,
            spoil=spoilt_signature,
        ),
        Reader("peft", _peft_folders, 0.07, read=_peft),
        Reader("adapterhub", _HUB.examples, 0.04, read=_HUB.read, spoil=Folders.spoilt),
        Reader("opendelta", _DELTA.examples, 0.03, read=_DELTA.read, spoil=Folders.spoilt),
        Reader("checkpoint", _checkpoints, 0.06, read=_checkpoint),
        Reader("posterior", _posteriors, 0.04, read=_posterior),
    )
}
