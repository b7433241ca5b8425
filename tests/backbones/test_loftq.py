"""LoftQ begins with what quantising takes from the weight, and ends as a LoRA on those codes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltatune import api
from deltatune.backbones import quantise
from deltatune.backbones.load import load_architecture, load_backbone
from deltatune.core.artefact import read
from deltatune.core.delta import Delta
from deltatune.core.errors import BackboneMismatchError, ConfigurationError
from deltatune.core.fingerprint import fingerprint
from deltatune.core.grammar import parse
from deltatune.core.quantised import Quantised
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

FORMATS = ("int8", "nf4")


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> None:
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")


def weighted(inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, outputs)).requires_grad_(False)


def begun(delta: Delta) -> dict[str, np.ndarray]:
    """W + s B A of each site, as it begins, in float64."""
    found = {}
    for link in delta.links:
        leaves = {leaf: delta.tensors()[full].double() for leaf, full in link.names.items()}
        new, _ = link.method.weight(link.site.weight().double(), None, leaves)
        found[link.site.name] = new.numpy()
    return found


def plain_of(module: nn.Module) -> np.ndarray:
    storage = storage_of(module)
    assert isinstance(storage, Quantised)
    return storage.dequantise(module, torch.float32).double().numpy()


def tail(error: np.ndarray, rank: int) -> float:
    """What the best approximation of a rank leaves of a matrix."""
    return float(np.sqrt((np.linalg.svd(error, compute_uv=False)[rank:] ** 2).sum()))


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=10)
@given(inputs=st.integers(4, 24), outputs=st.integers(4, 24), seed=st.integers(0, 9))
def test_it_begins_with_the_best_approximation_of_the_error(
    format: str, inputs: int, outputs: int, seed: int
) -> None:
    model = weighted(inputs, outputs, seed)
    W = model[0].weight.double().numpy()
    widest = min(inputs, outputs)
    quantise(model, format, at="0", error_rank=widest)
    error = W - plain_of(model[0])
    left = [float(np.linalg.norm(error))]
    for rank in range(1, widest + 1):
        delta = api.attach(model, f"loftq(rank={rank}, alpha=3.0)", at="0")
        (new,) = begun(delta).values()
        left.append(float(np.linalg.norm(W - new)))
        assert left[rank] == pytest.approx(tail(error, rank), rel=1e-4, abs=1e-5 * left[0])
        delta.detach()
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(left))
    assert left[1] < left[0] and left[-1] < 1e-4 * left[0]


@pytest.mark.parametrize("format", FORMATS)
def test_each_slice_of_a_fused_map_has_an_error_of_its_own(format: str) -> None:
    plain, model = (FAMILIES["gpt2"].build().requires_grad_(False) for _ in range(2))
    quantise(model, format, error_rank=3)
    delta = api.attach(model, "loftq(rank=2, at='block.linear')")
    twin = api.attach(plain, "lora(rank=2, at='block.linear')")
    weights = {link.site.name: link.site.weight().double().numpy() for link in twin.links}
    sites: dict[str, Site] = {link.site.name: link.site for link in delta.links}
    assert any(site.rows for site in sites.values())
    for name, new in begun(delta).items():
        error = weights[name] - sites[name].weight().double().numpy()
        found = float(np.linalg.norm(weights[name] - new))
        assert found == pytest.approx(tail(error, 2), rel=1e-4)


def test_the_start_on_nf4_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft.utils.loftq_utils", reason="the extra `peft` is missing")
    model = weighted(64, 32, 0)
    W = model[0].weight.detach().clone()
    quantise(model, "nf4", at="0", error_rank=4)
    (new,) = begun(api.attach(model, "loftq(rank=4, alpha=4.0)", at="0")).values()
    codes = plain_of(model[0])
    theirs = peft._low_rank_decomposition(W - torch.tensor(codes).float(), reduced_rank=4)
    np.testing.assert_allclose(new - codes, (theirs["L"] @ theirs["R"]).double(), atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_alternate_between_codes_and_triplets(format: str, rounds: int) -> None:
    model, rank = weighted(32, 24, 1), 6
    W = model[0].weight.detach().clone()
    quantise(model, format, at="0", error_rank=rank, error_rounds=rounds)
    spared = np.zeros(W.shape)
    for _ in range(rounds):
        turn = nn.Sequential(nn.Linear(32, 24, bias=False)).requires_grad_(False)
        turn[0].weight.copy_(W - torch.tensor(spared).float())
        quantise(turn, format, at="0")
        codes = plain_of(turn[0])
        U, S, V = np.linalg.svd(W.double().numpy() - codes, full_matrices=False)
        spared = (U[:, :rank] * S[:rank]) @ V[:rank]
    np.testing.assert_allclose(plain_of(model[0]), codes, atol=2e-3)
    (new,) = begun(api.attach(model, f"loftq(rank={rank})", at="0")).values()
    found = np.linalg.norm(W.double().numpy() - new)
    assert found == pytest.approx(tail(W.double().numpy() - plain_of(model[0]), rank), rel=1e-4)


def test_rounds_lower_the_error() -> None:
    left = []
    for rounds in (1, 5):
        model = weighted(64, 64, 0)
        W = model[0].weight.double().numpy()
        quantise(model, "nf4", at="0", error_rank=16, error_rounds=rounds)
        (new,) = begun(api.attach(model, "loftq(rank=16)", at="0")).values()
        left.append(np.linalg.norm(W - new))
    assert left[1] < left[0]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_kept_leaves_the_base_as_it_is(format: str, tmp_path: Path) -> None:
    kin = FAMILIES["bert"]

    def build(rank: int, rounds: int = 1, kept_as: str = format) -> nn.Module:
        model = kin.build().requires_grad_(False)
        quantise(model, kept_as, error_rank=rank, error_rounds=rounds)
        return model

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return kin.logits(model, kin.batch())

    model = build(4)
    assert fingerprint(model) == fingerprint(build(0))
    torch.testing.assert_close(logits(model), logits(build(0)), rtol=0, atol=0)
    delta = api.attach(model, "loftq(rank=3, at='attention.q')")
    move(delta)
    folder = api.save(delta, tmp_path / "delta")
    assert parse(read(folder).method) == parse("lora(rank=3, alpha=8.0, at='attention.q')")
    again = build(0)
    api.load(folder, again)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    with pytest.raises(BackboneMismatchError, match="with other weights"):
        api.load(folder, build(3, rounds=2))
    with pytest.raises(BackboneMismatchError, match="kept as"):
        api.load(folder, kin.build().requires_grad_(False))


def test_on_plain_numbers_it_begins_as_lora() -> None:
    kin = FAMILIES["bert"]
    found = [
        api.attach(kin.build(), f"{name}(rank=3, alpha=6.0)").tensors()
        for name in ("lora", "loftq")
    ]
    for one, other in zip(*(each.values() for each in found), strict=True):
        assert one.shape == other.shape and one.any() == other.any()
        assert one.abs().max() <= 32**-0.5


def test_without_what_was_rounded_off_it_is_refused() -> None:
    model = FAMILIES["bert"].build().requires_grad_(False)
    quantise(model, "int8")
    with pytest.raises(ConfigurationError, match=r"int8 with nothing of what .* error_rank=8"):
        api.attach(model, "loftq")
    api.attach(model, "lora")  # nothing of the refused one is left
    model = FAMILIES["bert"].build().requires_grad_(False)
    quantise(model, "int8", error_rank=2)
    with pytest.raises(ConfigurationError, match=r"with 2 triplets of what .* error_rank=3"):
        api.attach(model, "loftq(rank=3)")
    for rank, rounds in ((-1, 1), (0, 2), (2, 0)):
        with pytest.raises(ConfigurationError, match="error_rounds at least 1"):
            quantise(model, "int8", error_rank=rank, error_rounds=rounds)


def test_a_backbone_is_loaded_with_what_was_rounded_off() -> None:
    model = load_backbone("t5-nano", quantise="int8", error_rank=2).model
    delta = api.attach(model, "loftq(rank=2)")
    assert all(value.any() for value in delta.tensors().values())
    planned = load_architecture("t5-nano")
    quantise(planned, "int8", error_rank=2)  # without weights
    assert api.plan(planned, "loftq(rank=2)").trainable == api.plan(model, "lora(rank=2)").trainable
    assert not any(v.any() for v in api.attach(planned, "loftq(rank=2)").tensors().values())
