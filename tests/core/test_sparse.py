"""Tensors that are mostly zero are kept by what is not."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltatune import api
from deltatune.core import artefact as module
from deltatune.core import description
from deltatune.core.errors import ArtefactError
from deltatune.core.sparse import pack, packed_shapes, places_of, unpack
from deltatune.core.swap import swap

METHOD = "difference(at='first') + lora(rank=2, at='second')"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=nn.Linear(64, 96), second=nn.Linear(96, 64)))


@given(st.lists(st.integers(0, 4999), unique=True, max_size=1249), st.integers(0, 2**31))
def test_what_is_packed_comes_back(places: list[int], seed: int) -> None:
    value = torch.zeros(50, 100)
    random = torch.Generator().manual_seed(seed)
    value.view(-1)[places] = torch.randn(len(places), generator=random)
    value.view(-1)[places[:1]] = -0.0  # as a mask leaves it: it counts as zero
    packed, entries = pack({"w": value})
    assert entries == {"w": max(len(places) - 1, 0)}
    shapes = {name: tuple(held.shape) for name, held in packed.items()}
    assert packed_shapes({"w": (50, 100)}, entries, 0) == shapes
    back = unpack("w", (50, 100), packed["w"], packed[places_of("w")])
    assert torch.equal(back, value)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(5000),
        torch.zeros(4095),
        torch.zeros(5000, dtype=torch.int64),
        torch.zeros(5000).half(),
    ],
    ids=["full", "small", "integers", "half"],
)
def test_what_would_gain_nothing_is_left_whole(value: Tensor) -> None:
    packed, entries = pack({"w": value})
    assert entries == {} and packed["w"] is value


def pruned(seed: int) -> module.Delta:
    """A delta with large tensors, of which one entry in twenty is not zero."""
    delta = api.attach(model(), METHOD)
    random = torch.Generator().manual_seed(seed)
    for row in delta.bank.slots:
        drawn = torch.randn(row.shape, generator=random)
        row.data.copy_(drawn * (torch.rand(row.shape, generator=random) < 0.05))
    return delta


def test_a_pruned_delta_is_small_and_comes_back(tmp_path: Path) -> None:
    delta = pruned(0)
    folder = api.save(delta, tmp_path / "delta")
    entries = [entry.entries for entry in module.read(folder).tensors.values()]
    assert any(count is not None for count in entries) and None in entries
    dense = sum(4 * value.numel() for value in delta.tensors().values())
    assert (folder / "delta.safetensors").stat().st_size < 0.6 * dense
    wanted = delta.tensors()
    again = api.load(folder, model())
    other = pruned(1)
    swap(other, folder)
    for name, value in wanted.items():
        assert torch.equal(again.tensors()[name], value), name
        assert torch.equal(other.tensors()[name], value), name


def resealed(folder: Path, places: Tensor, name: str) -> None:
    """Writes other places, as somebody would who can compute digests."""
    held = load_file(folder / "delta.safetensors")
    save_file(held | {places_of(name): places}, folder / "delta.safetensors")
    content = json.loads((folder / "delta.json").read_text())
    content["size"] = (folder / "delta.safetensors").stat().st_size
    content["blake3"] = module._blake3(folder / "delta.safetensors")
    text = json.dumps(content | {"digest": ""})
    digest = f'"digest": "{description._digest(text, "")}"'
    (folder / "delta.json").write_text(text.replace('"digest": ""', digest, 1))


@pytest.mark.parametrize("wrong", ["beyond", "negative", "twice", "long", "short"])
def test_places_that_cannot_be_are_refused(tmp_path: Path, wrong: str) -> None:
    folder = api.save(pruned(0), tmp_path / "delta")
    listed = json.loads((folder / "delta.json").read_text())["tensors"]
    name = next(name for name, entry in listed.items() if entry["entries"])
    places = load_file(folder / "delta.safetensors")[places_of(name)]
    if wrong == "beyond":
        places[-1] = 2**31 - 1
    elif wrong == "negative":
        places[0] = -1
    elif wrong == "twice":
        places[1] = places[0]
    else:
        places = places.long() if wrong == "long" else places[:-1]
    resealed(folder, places, name)
    with pytest.raises(ArtefactError):
        api.load(folder, model())


def test_more_entries_than_there_are_is_refused() -> None:
    with pytest.raises(ArtefactError, match="cannot have 7 entries"):
        packed_shapes({"w": (2, 3)}, {"w": 7}, 0)
