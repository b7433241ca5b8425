"""Hubs of every kind: what is pushed is pulled."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from deltatune import api
from deltatune.core.artefact import read
from deltatune.core.errors import ArtefactError, ConfigurationError, UnknownNameError
from deltatune.hub import Hub, Reference, local_store


def test_what_is_pushed_is_pulled_and_loads(
    hub: Hub, folders: list[Path], model: nn.Module
) -> None:
    entry = hub.push(folders[0], "trec-lora:v1")
    assert entry == hub.show("trec-lora:v1") == hub.verify("trec-lora:v1")
    assert (entry.method, entry.task, entry.scores) == ("lora(rank=2)", "trec", {"accuracy": 0.9})
    assert entry.categories == ("reparameterisation",) and entry.backbone.startswith("Bert")
    artefact = read(folders[0])
    assert entry.digest == artefact.digest and entry.size == artefact.size
    place = hub.pull("trec-lora:v1")
    assert place.name == entry.digest and read(place) == artefact
    assert hub.pull(f"trec-lora@sha256:{entry.digest}") == place
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


def test_deltas_are_found_by_what_is_said_of_them(hub: Hub, folders: list[Path]) -> None:
    for name, folder in zip(("a-lora", "b-lora", "a-adapter"), folders, strict=True):
        hub.push(folder, name)

    def names(*words: str, **wanted: object) -> list[str]:
        return [reference.name for reference, _ in hub.search(*words, **wanted)]  # type: ignore[arg-type]

    assert names() == ["a-adapter", "a-lora", "b-lora"]
    assert names("LORA") == ["a-lora", "b-lora"] and names("a- rank=2") == ["a-lora"]
    assert names("bert trec") == names() and names("roberta") == []
    assert names(category="addition") == ["a-adapter"]
    sizes = {entry.size for _, entry in hub.entries()}
    assert names(least=0.9) == names() and names(least=0.91) == []
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


def test_an_address_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        Hub("nonsense://hub")


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
