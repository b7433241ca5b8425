"""`deltatune hub` from the first push to the last tidy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune import api
from deltatune.core.artefact import read, save
from deltatune.testing.families import FAMILIES

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    delta = api.attach(FAMILIES["bert"].build(), "lora(rank=2)")
    facts = {"task": "trec", "test": {"accuracy": 0.875}}
    return str(save(delta, tmp_path / "delta", facts=facts))


def test_a_delta_goes_round(
    call: Call, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DELTATUNE_HUB", str(tmp_path / "hub"))
    code, out, err = call("hub", "push", folder, "a/lora:v1")
    assert (code, err) == (0, "") and "scores: accuracy 0.875" in out
    digest = read(folder).digest
    assert f"digest: {digest}" in out
    assert call("hub", "show", "a/lora:v1")[1] == call("hub", "verify", "a/lora:v1")[1] == out
    said = json.loads(call("hub", "show", "a/lora:v1", "--json")[1])
    assert (said["name"], said["task"], said["digest"]) == ("a/lora:v1", "trec", digest)
    code, out, _ = call("hub", "pull", "a/lora:v1")
    assert read(out.strip()).digest == digest and str(tmp_path / "home") in out
    assert json.loads(call("hub", "pull", "a/lora:v1", "--json")[1]) == {"folder": out.strip()}
    code, out, _ = call("hub", "search", "lora", "trec")
    assert "a/lora:v1" in out and "accuracy 0.875" in out
    found = json.loads(call("hub", "search", "--category", "addition", "--json")[1])
    assert found == {"deltas": []}
    assert call("hub", "rm", "a/lora:v1") == (0, "", "")
    assert call("hub", "tidy", "--older=-1")[1] == "3 files removed\n"
    assert json.loads(call("hub", "search", "--json")[1]) == {"deltas": []}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pull", "lora"), "There is no delta 'lora:latest'"),
        (("push", "nowhere", "lora"), "is no delta"),
        (("show", "Lora"), "A delta is named"),
        (("rm", "lora"), "There is no delta"),
    ],
)
def test_a_mistake_is_one_line(
    call: Call, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = call("hub", *words, "--hub", str(tmp_path / "hub"))
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


def test_who_vouches_is_asked_for(
    call: Call, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTATUNE_HOME", str(tmp_path / "home"))
    hub = ("--hub", str(tmp_path / "hub"))
    keys = [call("hub", "key", str(tmp_path / name))[1].strip() for name in ("mine", "other")]
    assert call("hub", "sign", folder, "--key", str(tmp_path / "mine"))[1].strip() == keys[0]
    assert call("hub", "push", folder, "lora", *hub)[0] == 0
    assert call("hub", "pull", "lora", *hub, "--trusted", keys[0])[0] == 0
    assert call("hub", "verify", "lora", *hub, "--trusted", keys[1], "--trusted", keys[0])[0] == 0
    code, out, err = call("hub", "pull", "lora", *hub, "--trusted", keys[1])
    assert (code, out) == (2, "") and "signed by none of the keys" in err


def test_a_hub_is_written_as_a_page(call: Call, folder: str, tmp_path: Path) -> None:
    hub = ("--hub", str(tmp_path / "hub"))
    call("hub", "push", folder, "a/lora:v1", *hub)
    out = tmp_path / "page.html"
    assert call("hub", "site", *hub, "--out", str(out))[1] == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    assert "a/lora:v1" in text and "accuracy 0.875" in text and "lora(rank=2)" in text
    assert call("hub", "site", *hub, "--out", str(out))[0] == 0
    assert out.read_text(encoding="utf-8") == text


def test_an_address_is_asked_for(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_HUB", raising=False)
    code, _, err = call("hub", "search")
    assert code == 2 and "--hub" in err
