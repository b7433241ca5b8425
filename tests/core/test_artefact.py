"""Artefacts: written at once, read strictly, refused in one sentence."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deltatune import api
from deltatune.core import artefact as module
from deltatune.core import description
from deltatune.core import host as host_module
from deltatune.core.artefact import CARD, read, save
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import (
    ArtefactError,
    BackboneMismatchError,
    ConfigurationError,
    StateError,
)
from deltatune.core.fingerprint import vocabulary
from deltatune.core.host import host_of
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["llama"]
FILES = ("delta.json", "delta.safetensors")


@functools.cache
def model() -> PreTrainedModel:
    return KIN.build()


@pytest.fixture
def delta() -> Delta:
    made = api.attach(KIN.build(), "lora(rank=2) + bitfit(at='norm')")
    move(made)
    return made


@functools.cache
def written() -> dict[str, bytes]:
    """The files of one artefact."""
    with tempfile.TemporaryDirectory() as folder:
        made = api.attach(KIN.build(), "lora(rank=2)")
        target = save(made, Path(folder) / "delta", facts={"task": "glue_sst2", "score": 0.5})
        return {name: (target / name).read_bytes() for name in FILES}


def refused(files: dict[str, bytes]) -> None:
    """Asserts that these files give an ArtefactError and no delta."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        with pytest.raises(ArtefactError) as caught:
            api.load(folder, model())
    assert len(str(caught.value)) < 1500
    assert not deltas_of(model()) and host_of(model()) is None


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_any_flipped_byte_is_noticed(name: str, data: st.DataObject) -> None:
    content = bytearray(written()[name])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    refused(written() | {name: bytes(content)})


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_any_truncation_is_noticed(name: str, data: st.DataObject) -> None:
    content = written()[name]
    refused(written() | {name: content[: data.draw(st.integers(0, len(content) - 1))]})


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_other_content_is_no_delta(content: bytes) -> None:
    refused(written() | {"delta.json": content})


def signed(
    change: Callable[[dict[str, Any]], None], tensors: bytes | None = None
) -> dict[str, bytes]:
    """Files of somebody who can compute digests."""
    content = json.loads(written()["delta.json"])
    held = written()["delta.safetensors"] if tensors is None else tensors
    content["size"] = len(held)
    content["blake3"] = module.blake3(held).hexdigest()
    change(content)
    text = json.dumps(content | {"digest": ""})
    text = text.replace('"digest": ""', f'"digest": "{description._digest(text, "")}"', 1)
    return {"delta.json": text.encode(), "delta.safetensors": held}


def test_what_is_signed_and_untouched_is_loaded(tmp_path: Path) -> None:
    for name, content in signed(lambda content: None).items():
        (tmp_path / name).write_bytes(content)
    delta = api.load(tmp_path, model())
    delta.detach()


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown method": lambda c: c.update(method="lorra"),
    "no expression": lambda c: c.update(method="__import__('os').system('true')"),
    "nothing to tune": lambda c: c.update(method="lora(at='nowhere')"),
    "other shapes": lambda c: c.update(method="lora(rank=1000000000)"),
    "no tensors": lambda c: c.update(tensors={}),
    "a huge shape": lambda c: next(iter(c["tensors"].values())).update(shape=[2**60, 2**60]),
    "a negative shape": lambda c: next(iter(c["tensors"].values())).update(shape=[-1, 5]),
    "another dtype": lambda c: next(iter(c["tensors"].values())).update(dtype="float16"),
    "an unknown key": lambda c: c.update(more=1),
    "a version to come": lambda c: c.update(version=2),
    "another format": lambda c: c.update(format="other"),
    "no backbone": lambda c: c.update(backbone=None),
    "a wrong size": lambda c: c.update(size=3),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_description_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    refused(signed(change))


def test_hostile_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(written()["delta.safetensors"])
    tensors = load_file(tmp_path / "t")
    name = next(iter(tensors))
    for wrong in (
        tensors | {name: tensors[name].long()},
        tensors | {name: tensors[name].bool()},
        tensors | {name: tensors[name][:1]},
        tensors | {"more": torch.zeros(1)},
        {n: t for n, t in tensors.items() if n != name},
    ):
        save_file({n: t.contiguous() for n, t in wrong.items()}, tmp_path / "t")
        refused(signed(lambda content: None, (tmp_path / "t").read_bytes()))
    refused(signed(lambda content: None, b"\xff" * 64))
    refused(signed(lambda content: None, b""))
    refused({"delta.json": b"[" * 100_000, "delta.safetensors": b""})


def test_missing_files_and_strange_places(tmp_path: Path) -> None:
    for name in FILES:
        refused({other: content for other, content in written().items() if other != name})
    with pytest.raises(ArtefactError, match=r"delta\.json is missing"):
        read(tmp_path / "nowhere")
    (tmp_path / "delta.json").write_bytes(written()["delta.json"])
    (tmp_path / "delta.safetensors").mkdir()
    with pytest.raises(ArtefactError):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError):
        read(tmp_path / "file")


def test_what_was_saved_is_loaded(delta: Delta, tmp_path: Path) -> None:
    folder = save(delta, tmp_path / "deep" / "delta", facts={"score": 0.25})
    assert sorted(path.name for path in folder.iterdir()) == sorted((CARD, *FILES))
    content = read(folder)
    assert content.facts == {"score": 0.25} and content.method == delta.name
    fresh = KIN.build()
    again = api.load(folder, fresh)
    for name, value in delta.tensors().items():
        assert torch.equal(again.tensors()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_merged_delta_does_not_make_another_backbone(tmp_path: Path) -> None:
    fresh = KIN.build()
    first = api.attach(fresh, "lora")
    move(first)
    folder = api.save(first, tmp_path / "before")
    first.merge()
    second = api.load(folder, fresh)
    assert read(api.save(second, tmp_path / "after")).backbone == read(folder).backbone


def test_one_slot_of_many_is_saved(tmp_path: Path) -> None:
    bank = api.attach(KIN.build(), "lora", slots=3)
    move(bank)
    again = api.load(api.save(bank, tmp_path / "two", slot=2), KIN.build())
    assert torch.equal(again.bank.slots[0], bank.bank.slots[2])


def test_an_existing_folder_is_replaced_only_if_asked_and_only_if_it_is_a_delta(
    delta: Delta, tmp_path: Path
) -> None:
    folder = api.save(delta, tmp_path / "delta")
    before = (folder / "delta.safetensors").read_bytes()
    with pytest.raises(ArtefactError, match="exists"):
        api.save(delta, folder)
    move(delta, 5)
    api.save(delta, folder, overwrite=True)
    assert (folder / "delta.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(ArtefactError, match="something else"):
        api.save(delta, precious, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years"


def test_both_roads_to_the_file_write_the_same(delta: Delta, tmp_path: Path) -> None:
    tensors = module.stored_tensors(delta)
    module._write_tensors(tensors, tmp_path / "short")
    module.save_file(tensors, tmp_path / "long")
    assert (tmp_path / "short").read_bytes() == (tmp_path / "long").read_bytes()
    halved = {name: value.bfloat16() for name, value in tensors.items()}
    module._write_tensors(halved, tmp_path / "halved")
    assert all(torch.equal(halved[n], v) for n, v in load_file(tmp_path / "halved").items())


def test_an_unwritable_place_is_refused(delta: Delta, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="Cannot write"):
        api.save(delta, tmp_path / "file" / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("failing", ["_write_tensors", "_publish", "sealed"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    failing: str, overwrite: bool, delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        api.save(delta, tmp_path / "delta")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, failing, full)
    with pytest.raises(ArtefactError, match="No space left"):
        api.save(delta, tmp_path / "delta", overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == overwrite


def test_a_failing_rename_brings_the_former_one_back(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = api.save(delta, tmp_path / "delta")
    rename = Path.rename

    def fails_into_place(self: Path, target: Path) -> Path:
        if target == folder and self.name != "former":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(ArtefactError, match="Input/output"):
        api.save(delta, folder, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    api.load(folder, KIN.build())


def test_a_state_dict_may_hold_what_no_module_does(tmp_path: Path) -> None:
    models = [KIN.build() for _ in range(2)]
    for scale, model in enumerate(models):

        def add(module: Any, state: dict[str, Any], *rest: Any, scale: int = scale) -> None:
            state["model.layers.0.mlp.up_proj.weight.scales"] = torch.full((3,), float(scale))

        model.register_state_dict_post_hook(add)
    folder = api.save(api.attach(models[0], "lora"), tmp_path / "one")
    with pytest.raises(BackboneMismatchError, match="other weights"):
        api.load(folder, models[1])


def test_facts_must_be_json(delta: Delta, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="facts"):
        save(delta, tmp_path / "delta", facts={"model": object()})
    assert not list(tmp_path.iterdir())


def test_the_backbone_must_be_the_one(delta: Delta, tmp_path: Path) -> None:
    folder = api.save(delta, tmp_path / "delta")
    other = KIN.build()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(BackboneMismatchError, match="other weights"):
        api.load(folder, other)
    with pytest.raises(BackboneMismatchError, match="another architecture"):
        api.load(folder, FAMILIES["gpt2"].build())
    narrow = KIN.build()
    narrow.to(torch.bfloat16)
    api.load(folder, narrow)  # the same checkpoint in another precision
    assert not deltas_of(other)


def test_a_backbone_that_lacks_a_block_is_another(tmp_path: Path) -> None:
    short = KIN.build()
    short.model.layers = short.model.layers[:-1]
    delta = api.attach(short, "lora(rank=2)")
    move(delta)
    folder = api.save(delta, tmp_path / "delta")
    with pytest.raises(BackboneMismatchError, match="another architecture"):
        api.load(folder, KIN.build())
    delta.detach()
    api.load(folder, short)
    whole = api.attach(KIN.build(), "lora(rank=2)")
    with pytest.raises(BackboneMismatchError, match="another architecture"):
        api.load(api.save(whole, tmp_path / "whole"), short)


def test_a_backbone_is_read_once_for_several_deltas_while_it_stays_as_it_is(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, calls = api.save(delta, tmp_path / "delta"), KIN.build(), []
    whole = host_module.fingerprint

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(args)
        return whole(*args, **named)

    monkeypatch.setattr(host_module, "fingerprint", counted)
    first = api.load(folder, model)
    api.load(folder, model).detach()
    assert len(calls) == 1
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(BackboneMismatchError, match="other weights"):
        api.load(folder, model)
    assert len(calls) == 2 and deltas_of(model) == (first,)
    first.detach()
    assert host_of(model) is None


class Tokenizer:
    """As much of a tokenizer as is looked at."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = {token: k for k, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def test_a_tokenizer_with_other_numbers_is_refused_where_one_is_named(
    delta: Delta, tmp_path: Path
) -> None:
    mine, model = Tokenizer("a", "b", "c"), KIN.build()
    named = api.save(delta, tmp_path / "named", facts={"vocabulary": vocabulary(mine)})
    api.load(named, model, tokenizer=Tokenizer("a", "b", "c")).detach()
    for other in (Tokenizer("a", "c", "b"), Tokenizer("a", "b"), Tokenizer("a", "b", "c", "d")):
        with pytest.raises(BackboneMismatchError, match="another tokenizer"):
            api.load(named, model, tokenizer=other)
    assert not deltas_of(model)
    api.load(api.save(delta, tmp_path / "unnamed"), model, tokenizer=other).detach()


def test_a_control_is_saved_while_it_is_attached(tmp_path: Path) -> None:
    made = api.attach(KIN.build(), "full")
    move(made)
    again = api.load(api.save(made, tmp_path / "full"), KIN.build())
    assert torch.equal(again.bank.slots[3], made.bank.slots[3])
    made.detach()
    with pytest.raises(StateError, match="Save before detach"):
        api.save(made, tmp_path / "late")
    shutil.rmtree(tmp_path / "full")


def test_other_weights_of_the_same_shapes_are_taken_with_a_warning_on_request(
    tmp_path: Path,
) -> None:
    made_for, other = KIN.build(), KIN.build()
    delta = api.attach(made_for, "lora(rank=2)")
    move(delta)
    folder = api.save(delta, tmp_path / "delta")
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    with pytest.raises(BackboneMismatchError, match="other weights"):
        api.load(folder, other)
    with pytest.warns(UserWarning, match=r"other weights.*loaded all the same") as caught:
        taken = api.load(folder, other, other_weights="warn")
    assert caught[0].filename == __file__
    assert all(torch.equal(value, taken.tensors()[n]) for n, value in delta.tensors().items())
    with pytest.raises(BackboneMismatchError, match="another architecture"):
        api.load(folder, FAMILIES["bert"].build(), other_weights="warn")
