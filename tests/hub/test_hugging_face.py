"""Repositories of the Hugging Face Hub, on a server of this machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from tests.hub.hugging_face import Repository, serving
from torch import nn

from deltatune import api
from deltatune.core.artefact import CARD, FILES, save
from deltatune.core.errors import ArtefactError, ConfigurationError, UnknownNameError
from deltatune.hub import Hub
from deltatune.interop import peft

Served = dict[str, Repository]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving() as (address, repositories):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        made = functools.partial(HfApi, endpoint=address)
        monkeypatch.setattr("deltatune.hub.hugging_face.HfApi", made)
        yield repositories


@pytest.fixture
def team(served: Served, tmp_path: Path) -> Hub:
    return Hub("hf://team", store=tmp_path / "store")


def files(served: Served, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = served[name]
    return repository.commits[repository.branches[branch][-1]]


def test_a_repository_shows_what_it_holds(
    team: Hub, served: Served, model: nn.Module, tmp_path: Path
) -> None:
    delta = api.attach(model, "lora(rank=2)")
    folder = save(delta, tmp_path / "delta", facts={"licence": "mit", "backbone": "a/b"})
    peft.write(delta, tmp_path / "peft")
    delta.detach()
    team.push(folder, "trec", beside=tmp_path / "peft")
    held = files(served, "team/trec")
    assert held.keys() == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", CARD,
        *FILES,
    }  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert held[name] == (tmp_path / "peft" / name).read_bytes()
    card = ModelCard(held["README.md"].decode())
    said = card.data.to_dict()
    assert (said["library_name"], said["license"]) == ("peft", "mit")
    assert {"deltatune", "peft"} <= set(said["tags"])
    assert "# lora(rank=2) for a/b" in card.text
    team.push(folder, "trec")  # without what PEFT reads, which goes
    assert not {name for name in files(served, "team/trec") if name.startswith("adapter")}
    card = ModelCard(files(served, "team/trec")["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "deltatune"


def test_tags_are_branches(team: Hub, served: Served, folders: list[Path]) -> None:
    first, second = team.push(folders[0], "x:v1"), team.push(folders[1], "x:v2")
    assert set(served["team/x"].branches) == {"main", "v1", "v2"}
    assert FILES[0] not in files(served, "team/x")  # nothing is `latest` yet
    assert [str(reference) for reference, _ in team.entries()] == ["x:v1", "x:v2"]
    with pytest.raises(UnknownNameError):
        team.show("x")
    team.push(folders[2], "x")
    team.remove("x:v1")
    assert [str(reference) for reference, _ in team.entries()] == ["x:latest", "x:v2"]
    team.remove("x")
    assert set(files(served, "team/x")) == {".gitattributes", "README.md"}
    assert team.show("x:v2") == second != first
    assert [str(reference) for reference, _ in team.entries()] == ["x:v2"]
    assert team.tidy() == 0


def test_what_was_damaged_is_not_handed_out(team: Hub, served: Served, folders: list[Path]) -> None:
    team.push(folders[0], "x")
    for name in FILES:
        held = files(served, "team/x")
        whole = held[name]
        for wrong in (whole[:-1], whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:]):
            # As a commit of its own: what a commit holds never changes, and is kept here.
            served["team/x"].commit("main", {**held, name: wrong})
            with pytest.raises(ArtefactError):
                team.pull("x")
        served["team/x"].commit("main", held)
    served["team/x"].commit("main", {**held, "card.md": b"x" * (2 << 20)})
    with pytest.raises(ArtefactError, match=r"card\.md has .* more than"):
        team.pull("x")
    served["team/x"].commit("main", held)
    assert team.pull("x").name == team.show("x").digest


def test_what_is_not_there_is_not_put_beside(team: Hub, folders: list[Path]) -> None:
    with pytest.raises(ArtefactError, match="no folder nowhere"):
        team.push(folders[0], "x", beside="nowhere")


def test_names_that_the_hub_has_not_are_refused(team: Hub, folders: list[Path]) -> None:
    for name in ("a/b", "a:main"):
        with pytest.raises(ConfigurationError, match="a repository of team"):
            team.push(folders[0], name)
    for owner in ("", "a/b", "-a"):
        with pytest.raises(ConfigurationError, match="hf://owner"):
            Hub(f"hf://{owner}")


def test_a_hub_that_does_not_answer_is_no_empty_hub(
    served: Served, folders: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    team = Hub("hf://team", store=tmp_path / "store")
    with pytest.raises(ArtefactError, match=r"cannot be read: .*offline"):
        team.pull("x")
    with pytest.raises(ArtefactError, match=r"cannot be written: .*offline"):
        team.push(folders[0], "x")
