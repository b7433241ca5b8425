"""A delta from disk takes the place of what a slot holds, or is refused and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.methods.test_conformance import METHODS

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ArtefactError,
    BackboneMismatchError,
    ConfigurationError,
    StateError,
)
from deltatune.core.grammar import Expression, parse
from deltatune.core.status import status
from deltatune.core.swap import swap
from deltatune.testing.case import Case, move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["bert"]


def saved(folder: Path, method: str = "lora(rank=2)", seed: int = 3) -> Path:
    delta = api.attach(KIN.build(), method, seed=seed)
    move(delta, seed)
    return api.save(delta, folder / f"{seed}")


def bank(method: str = "lora(rank=2)") -> Delta:
    return api.attach(KIN.build(), method, slots=2)


@pytest.mark.parametrize("method", [one for one in METHODS if one != "full"])
def test_it_gives_what_loading_gives(method: str, tmp_path: Path) -> None:
    case = Case(method, "bert")
    stored = str(Expression(tuple(one.stored() for one in parse(method))))
    folder = saved(tmp_path, method)
    held = bank(stored)
    other = {name: value.clone() for name, value in held.tensors(0).items()}
    for _ in range(2):  # verified, and verified before
        swap(held, folder, 1)
        loaded = case.model()
        api.load(folder, loaded)
        with held.route([1] * 4):
            assert torch.equal(case.logits(held.model), case.logits(loaded))  # type: ignore[arg-type]
        move(held)
    now = held.tensors(0)
    assert all(not torch.equal(now[n], other[n]) for n in held.bank.trained if now[n].numel() > 4)


def test_status_names_the_folder_and_sees_changes(tmp_path: Path) -> None:
    held, folder = bank(), saved(tmp_path)
    swap(held, folder, 1)
    first, second = status(held.model).deltas[0].slots
    assert (first.saved, second.saved, second.changed) == (None, str(folder), False)
    move(held)
    assert status(held.model).deltas[0].slots[1].changed


def test_a_file_that_changed_is_verified_again(tmp_path: Path) -> None:
    held, folder = bank(), saved(tmp_path)
    swap(held, folder)
    before = held.tensors(0)
    file = folder / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    with pytest.raises(ArtefactError, match="digest"):
        swap(held, folder)
    assert all(torch.equal(value, before[name]) for name, value in held.tensors(0).items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    held = bank()
    with pytest.raises(ArtefactError, match="a delta of its own"):
        swap(held, saved(tmp_path, "bitfit", seed=1))
    for method in ("masking", "prefix(length=2, reparameterise=True)"):  # what is saved is plain
        with pytest.raises(ArtefactError, match="a delta of its own"):
            swap(bank(method), saved(tmp_path / method, method))
    with pytest.raises(ArtefactError, match="is no delta"):
        swap(held, tmp_path / "nothing")
    folder = saved(tmp_path)
    with pytest.raises(ConfigurationError, match="slot 5"):
        swap(held, folder, 5)
    held.merge(1)
    with pytest.raises(StateError, match="merged"):
        swap(held, folder, 1)
    held.unmerge()
    with pytest.raises(StateError, match="trains"):
        swap(api.attach(KIN.build(), "full"), folder)
    model = KIN.build()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    other = api.attach(model, "lora(rank=2)")
    with pytest.raises(BackboneMismatchError):
        swap(other, folder)
    held.detach()
    with pytest.raises(StateError, match="detached"):
        swap(held, folder)


def test_a_weight_changed_under_the_delta_is_seen(tmp_path: Path) -> None:
    held, folder = bank(), saved(tmp_path)
    swap(held, folder)
    with torch.no_grad():
        held.model.get_parameter("classifier.weight").view(-1)[2] += 1e-3
    with pytest.raises(BackboneMismatchError, match="other weights"):
        swap(held, folder)


def test_a_weight_that_is_replaced_or_moved_is_seen(tmp_path: Path) -> None:
    held, folder = bank(), saved(tmp_path)
    swap(held, folder)
    classifier = held.model.get_submodule("classifier")
    weight = classifier.get_parameter("weight")
    other = torch.nn.Parameter(weight.detach() + 1, requires_grad=False)
    classifier.register_parameter("weight", other)
    with pytest.raises(BackboneMismatchError, match="other weights"):
        swap(held, folder)
    classifier.register_parameter("weight", weight)
    swap(held, folder)
    weight.data = weight.data + 1
    with pytest.raises(BackboneMismatchError, match="other weights"):
        swap(held, folder)
