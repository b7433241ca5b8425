"""A hub in a folder and in memory: what is pushed is pulled, and nothing broken is handed out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from torch import nn

from deltatune import api
from deltatune.core.artefact import FILES, read, save
from deltatune.core.errors import ArtefactError, ConfigurationError, UnknownNameError
from deltatune.hub import Hub, Reference, local_store
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

FACTS = {"task": "trec", "test": {"accuracy": 0.9, "note": "x", "nan": None}, "backbone": "tiny"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["bert"].build()


@pytest.fixture(scope="module")
def folders(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three artefacts: two LoRAs and an adapter."""
    root, made = tmp_path_factory.mktemp("deltas"), []
    for seed, method in enumerate(("lora(rank=2)", "lora(rank=2)", "adapter(bottleneck=2)")):
        delta = api.attach(model, method)
        move(delta, seed)
        made.append(save(delta, root / str(seed), facts=FACTS))
        delta.detach()
    return made


@pytest.fixture(params=["folder", "memory"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    url = str(tmp_path / "hub") if request.param == "folder" else "memory://hub"
    yield Hub(url, store=tmp_path / "store")
    fsspec.filesystem("memory").store.clear()


def changed(hub: Hub, name: str) -> str:
    """The place of a file in the hub whose path ends so."""
    (found,) = [path for path in hub._files.find(hub._root) if path.endswith(name)]
    return str(found)


def test_what_is_pushed_is_pulled_and_loads(
    hub: Hub, folders: list[Path], model: nn.Module
) -> None:
    entry = hub.push(folders[0], "glue/trec-lora:v1")
    assert entry == hub.show("glue/trec-lora:v1") == hub.verify("glue/trec-lora:v1")
    assert (entry.method, entry.task, entry.scores) == ("lora(rank=2)", "trec", {"accuracy": 0.9})
    assert entry.categories == ("reparameterisation",) and entry.backbone.startswith("Bert")
    artefact = read(folders[0])
    assert entry.digest == artefact.digest and entry.size == artefact.size
    place = hub.pull("glue/trec-lora:v1")
    assert place.name == entry.digest and read(place) == artefact
    assert hub.pull(f"glue/trec-lora@sha256:{entry.digest}") == place
    delta = api.load(place, model)
    assert str(delta.expression) == "lora(rank=2)"
    delta.detach()


def test_a_tag_moves_and_a_digest_does_not(hub: Hub, folders: list[Path]) -> None:
    first = hub.push(folders[0], "lora")
    second = hub.push(folders[1], "lora")
    assert first != second and hub.show("lora") == hub.show("lora:latest") == second
    assert hub.show(f"lora@sha256:{first.digest}") == first
    hub.push(folders[1], "lora")  # nothing changes
    assert [str(reference) for reference, _ in hub.entries()] == ["lora:latest"]


def test_a_pulled_delta_is_kept_and_needs_the_hub_for_its_tag_alone(
    hub: Hub, folders: list[Path]
) -> None:
    hub.push(folders[0], "lora")
    place = hub.pull("lora")
    hub._files.rm_file(changed(hub, FILES[1]))
    assert hub.pull("lora") == place
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_deltas_are_found_by_what_is_said_of_them(hub: Hub, folders: list[Path]) -> None:
    for name, folder in zip(("a/lora", "b/lora", "a/adapter"), folders, strict=True):
        hub.push(folder, name)

    def names(*words: str, **wanted: object) -> list[str]:
        return [reference.name for reference, _ in hub.search(*words, **wanted)]  # type: ignore[arg-type]

    assert names() == ["a/adapter", "a/lora", "b/lora"]
    assert names("LORA") == ["a/lora", "b/lora"] and names("a/ rank=2") == ["a/lora"]
    assert names("bert trec") == names() and names("roberta") == []
    assert names(category="addition") == ["a/adapter"]
    sizes = {entry.size for _, entry in hub.entries()}
    assert names(largest=min(sizes) - 1) == [] and len(names(largest=max(sizes))) == 3


def test_what_is_not_there_is_said_with_what_is(hub: Hub, folders: list[Path]) -> None:
    with pytest.raises(UnknownNameError, match="None is known"):
        hub.pull("lora")
    hub.push(folders[0], "lora")
    with pytest.raises(UnknownNameError, match="lora:latest"):
        hub.show("lorra")
    with pytest.raises(UnknownNameError, match="lora:latest"):
        hub.show("lora@sha256:" + "0" * 64)
    with pytest.raises(ConfigurationError, match="A digest is found"):
        hub.push(folders[0], "lora@sha256:" + "0" * 64)
    with pytest.raises(ArtefactError, match="is no delta"):
        hub.push(folders[0].parent, "lora")


@pytest.mark.parametrize("file", FILES)
def test_what_was_damaged_is_not_handed_out(hub: Hub, folders: list[Path], file: str) -> None:
    hub.push(folders[0], "lora")
    path = changed(hub, file)
    content = bytearray(hub._files.cat_file(path))
    content[-20] ^= 1
    hub._files.pipe_file(path, bytes(content))
    for ask in (hub.pull, hub.verify):
        with pytest.raises(ArtefactError):
            ask("lora")
    assert not list((hub._store).glob("*"))
    hub._files.pipe_file(path, bytes(content[:-1]))
    with pytest.raises(ArtefactError):
        hub.pull("lora")
    hub._files.rm_file(path)
    with pytest.raises(ArtefactError, match="Push it again"):
        hub.pull("lora")
    hub.push(folders[0], "lora")
    assert read(hub.pull("lora")).digest == hub.show("lora").digest


def test_an_entry_that_lies_or_is_none_is_found_out(hub: Hub, folders: list[Path]) -> None:
    hub.push(folders[0], "lora")
    path = changed(hub, "@latest.json")
    said = json.loads(hub._files.cat_file(path))
    hub._files.pipe_file(path, json.dumps({**said, "scores": {"accuracy": 1.0}}).encode())
    with pytest.raises(ArtefactError, match="not what its tag says"):
        hub.pull("lora")
    wrong = (
        {"more": 1},
        {"digest": "../../names"},
        {"digest": said["digest"] + "\n"},
        {"size": -1},
    )
    changes = [json.dumps({**said, **change}).encode() for change in wrong]
    for content in (b"", b"[]", b"{}", b"\xff", *changes):
        hub._files.pipe_file(path, content)
        with pytest.raises(ArtefactError, match="is broken"):
            hub.pull("lora")
    one = json.dumps({**said, "digest": hub.push(folders[2], "other").digest}).encode()
    hub._files.pipe_file(path, one)
    with pytest.raises(ArtefactError, match="not what its tag says"):
        hub.pull("lora")


def test_a_description_that_is_too_large_is_not_read(
    hub: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(folders[0], "lora")
    monkeypatch.setattr("deltatune.hub.hub._LARGEST_JSON", 100)
    with pytest.raises(ArtefactError, match="more than a description"):
        hub.pull("lora")


def test_files_that_no_push_has_written_are_no_deltas(hub: Hub, folders: list[Path]) -> None:
    hub.push(folders[0], "lora")
    place = hub._root + "/names/"
    for name in ("Upper/@latest.json", "lora/@Bad.json", "lora/readme.md", "lora/@v1.json.part-1"):
        hub._files.makedirs(hub._files._parent(place + name), exist_ok=True)
        hub._files.pipe_file(place + name, b"x")
    assert [str(reference) for reference, _ in hub.entries()] == ["lora:latest"]


def test_tidying_takes_what_no_tag_names_once_it_is_old(hub: Hub, folders: list[Path]) -> None:
    kept = hub.push(folders[0], "kept")
    gone = hub.push(folders[1], "gone")
    hub.remove("gone")
    with pytest.raises(UnknownNameError):
        hub.remove("gone")
    assert hub.show(f"gone@sha256:{gone.digest}") == gone
    left = f"{hub._delta(kept.digest)}/{FILES[1]}.part-123"
    hub._files.pipe_file(left, b"half")
    assert hub.tidy() == 0
    assert hub.tidy(older=-1) == 3  # two files of the delta, and half a file
    assert hub.tidy(older=-1) == 0
    with pytest.raises(UnknownNameError):
        hub.show(f"gone@sha256:{gone.digest}")
    assert hub.verify("kept") == kept


def test_an_address_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        Hub("nonsense://hub")


def test_a_system_that_can_only_be_read_says_so(
    hub: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("read-only")

    monkeypatch.setattr(type(hub._files), "put_file", refuse)
    with pytest.raises(ArtefactError, match="cannot be written: read-only"):
        hub.push(folders[0], "lora")
    assert list(hub.entries()) == []


def test_a_store_that_cannot_be_written_says_so(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hub = Hub(tmp_path / "hub", store=tmp_path / "file" / "store")
    hub.push(folders[0], "lora")
    with pytest.raises(ArtefactError, match="Cannot write to"):
        hub.pull("lora")


def test_where_pulled_deltas_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DELTATUNE_HOME", str(tmp_path))
    assert local_store() == tmp_path / "deltas"
    monkeypatch.delenv("DELTATUNE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_store() == tmp_path / "deltatune" / "deltas"
    assert Reference("a") == Reference.parse("a:latest")
