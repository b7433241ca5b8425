"""Who vouches for a delta: signatures, and what is done to them."""

from __future__ import annotations

import re
import shutil
import stat
from pathlib import Path

import pytest
from torch import nn

import deltatune as dt
from deltatune.core.artefact import FILES
from deltatune.core.errors import ArtefactError, ConfigurationError, StateError
from deltatune.hub import Hub, check_signed, make_key, sign, signers

pytest.importorskip("cryptography", reason="cryptography, of `signatures`, is not installed")


@pytest.fixture
def folder(folders: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "delta"))


def test_what_is_signed_is_vouched_for(folder: Path, tmp_path: Path, model: nn.Module) -> None:
    mine, other = make_key(tmp_path / "mine"), make_key(tmp_path / "other")
    assert re.fullmatch("[0-9a-f]{64}", mine) and mine != other
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o600
    assert signers(folder) == ()
    assert sign(folder, tmp_path / "mine") == mine and signers(folder) == (mine,)
    assert check_signed(folder, [other, mine]) == mine
    dt.load(folder, model, trusted=[mine]).detach()
    with pytest.raises(ArtefactError, match="signed by none of the keys"):
        dt.load(folder, model, trusted=[other])
    sign(folder, tmp_path / "other")
    assert signers(folder) == tuple(sorted((mine, other)))
    with pytest.raises(StateError, match="cannot be written"):
        make_key(tmp_path / "mine")


def test_another_delta_or_signature_is_noticed(
    folder: Path, folders: list[Path], tmp_path: Path
) -> None:
    mine, other = make_key(tmp_path / "mine"), make_key(tmp_path / "other")
    sign(folder, tmp_path / "mine")
    place = folder / f"{mine}.ed25519"
    held = place.read_bytes()
    shutil.copy(place, folder / f"{other}.ed25519")  # by another hand
    assert check_signed(folder, [mine]) == mine
    for ask in (lambda: check_signed(folder, [other]), lambda: signers(folder)):
        with pytest.raises(ArtefactError, match="does not sign the delta"):
            ask()
    (folder / f"{other}.ed25519").unlink()
    for content in (b"", held[:-1], held[:-2] + b"\n", held * 2, held.upper(), b"\xff" * 129):
        place.write_bytes(content)
        with pytest.raises(ArtefactError, match="does not sign the delta"):
            check_signed(folder, [mine])
    place.write_bytes(held)
    for name in FILES:  # whole, but of another delta
        shutil.copy(folders[1] / name, folder / name)
    with pytest.raises(ArtefactError, match="does not sign the delta"):
        check_signed(folder, [mine])


@pytest.mark.parametrize("key", ["", "ab", "G" * 64, "A" * 64, "../../etc/passwd"])
def test_what_is_no_key_is_said(folder: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigurationError, match="64 hexadecimal digits"):
        check_signed(folder, [key])
    (tmp_path / "file").write_text(key)
    with pytest.raises(ConfigurationError, match="holds no private key"):
        sign(folder, tmp_path / "file")


def test_signatures_go_along_in_every_hub(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mine, other = make_key(tmp_path / "mine"), make_key(tmp_path / "other")
    strict = Hub(hub.url, store=tmp_path / "strict", trusted=[mine])
    hub.push(folder, "lora")
    with pytest.raises(ArtefactError, match="signed by none of the keys"):
        strict.pull("lora")
    place = hub.pull("lora")
    sign(folder, tmp_path / "mine")
    hub.push(folder, "lora")
    assert signers(strict.pull("lora")) == (mine,) and signers(place) == ()
    # What was pulled before it was signed is fetched once more.
    again = Hub(hub.url, store=place.parent, trusted=[other, mine])
    assert again.pull("lora") == place and signers(place) == (mine,)
    assert again.verify("lora") == hub.show("lora")
    (folder / f"{mine}.ed25519").write_bytes(b"0" * 128 + b"\n")
    with pytest.raises(ArtefactError, match="does not sign the delta"):
        hub.push(folder, "lora")
