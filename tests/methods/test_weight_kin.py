"""Kin of LoRA that begin in the weight, share or bound it: against PEFT 0.21 and their papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.linear_map import INPUTS, OUTPUTS, Leaves, Map, Tiny, changed, with_peft
from torch import Tensor

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.grammar import parse
from deltatune.core.method import METHODS
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES


def randlora(p: Leaves) -> Leaves:
    """PEFT pairs rank j of term n with the column of another rank and term, all drawn alike."""
    rank, terms = p["randlora_lambda"].shape
    A = p["randlora_A"].flatten(1)
    B = p["randlora_B"].flatten(1).unflatten(1, (rank, terms)).transpose(1, 2).flatten(1)
    A, B = (A, B) if B.shape[0] == OUTPUTS else (B.mT, A.mT)
    return {"A": A, "B": B, "u": p["randlora_lambda"].mT, "v": p["randlora_gamma"]}


RANDLORA = {"r": 3, "randlora_alpha": 6}
ROAD = {"road_theta": "theta", "road_alpha": "alpha"}
PARITY: dict[str, tuple[str, dict[str, Any], Map]] = {
    "delora(rank=3)": (
        "DeloraConfig",
        {"r": 3},
        {"delora_A": "A", "delora_B": "B", "delora_lambda": "bound", "delora_w_norm": "norms"},
    ),
    "randlora(rank=3, alpha=6.0)": ("RandLoraConfig", RANDLORA, randlora),
    "vb_lora(rank=3, vectors=10, block=4, chosen=3)": (
        "VBLoRAConfig",
        {"r": 3, "num_vectors": 10, "vector_length": 4, "topk": 3, "init_weights": None},
        lambda p: {
            "A": p["vblora_logits_A"],
            "B": p["vblora_logits_B"].transpose(0, 1),
            "bank": p["vblora_vector_bank"],
        },
    ),
    "road(group=8, variant=2)": ("RoadConfig", {"variant": "road_2", "group_size": 8}, ROAD),
    "road(group=8, variant=4)": ("RoadConfig", {"variant": "road_4", "group_size": 8}, ROAD),
    "waveft(coefficients=30, scale=3.0)": (
        "WaveFTConfig",
        {"n_frequency": 30, "scaling": 3.0},
        {"waveft_spectrum": "c", "places": "places"},
    ),
}
SPECTRAL = ("pissa", "milora", "olora")


def started(method: str, model: Tiny | None = None) -> dict[str, Tensor]:
    """The leaves of a fresh delta on one linear map."""
    delta = api.attach(Tiny() if model is None else model, method, at="lin")
    return {name.rpartition("/")[2]: value for name, value in delta.tensors().items()}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about CUDA and its own names
@pytest.mark.parametrize("inputs", [INPUTS, 32])
@pytest.mark.parametrize("method", PARITY)
def test_the_output_is_that_of_peft(method: str, inputs: int) -> None:
    ours, theirs = with_peft(method, *PARITY[method], inputs=inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about CUDA and its own names
@pytest.mark.parametrize("alpha", [3, 12])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_starts_are_those_of_peft(name: str, alpha: int) -> None:
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    config = peft.LoraConfig(r=3, lora_alpha=alpha, init_lora_weights=name, target_modules=["lin"])
    theirs = peft.get_peft_model(Tiny(), config).base_model.model.lin
    ours = started(f"{name}(rank=3, alpha={alpha})")
    torch.testing.assert_close(ours["A"], theirs.lora_A["default"].weight.detach())
    torch.testing.assert_close(ours["B"], theirs.lora_B["default"].weight.detach())
    residual = Tiny().lin.weight.detach() - alpha / 3 * ours["B0"] @ ours["A0"]
    torch.testing.assert_close(theirs.base_layer.weight.detach(), residual)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SPECTRAL), st.integers(1, INPUTS), st.sampled_from([2.0, 8.0, 16.0]))
def test_what_is_taken_out_is_what_is_put_back(name: str, rank: int, alpha: float) -> None:
    p = started(f"{name}(rank={rank}, alpha={alpha})")
    assert torch.equal(p["A"], p["A0"]) and torch.equal(p["B"], p["B0"])
    W, start = Tiny().lin.weight.detach(), alpha / rank * p["B0"] @ p["A0"]
    values = torch.linalg.svdvals(W)
    if name == "olora":
        torch.testing.assert_close(p["B"].mT @ p["B"], torch.eye(rank))
    elif name == "pissa":  # of all matrices of this rank, the nearest
        torch.testing.assert_close((W - start).norm(), values[rank:].norm(), atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(start.norm(), values[-rank:].norm(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.linalg.svdvals(W - start)[:-rank], values[:-rank])
    if rank == INPUTS and (name != "olora" or alpha == rank):
        torch.testing.assert_close(start, W)


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_difference_is_that_of_the_products(name: str) -> None:
    W, new, _, p = changed(f"{name}(rank=3, alpha=6.0)")
    assert not torch.equal(p["A"], p["A0"])
    wanted = 2.0 * (p["B"] @ p["A"] - p["B0"] @ p["A0"])
    torch.testing.assert_close(new - W, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*SPECTRAL, "lora_xs"])
def test_a_weight_is_decomposed_once_and_let_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for decompose in ("svd", "qr"):
        plain = getattr(torch.linalg, decompose)
        monkeypatch.setattr(
            torch.linalg, decompose, lambda *a, plain=plain, **k: calls.append(1) or plain(*a, **k)
        )
    model = Tiny()
    delta = api.attach(model, f"{name}(rank=3)", at="lin")
    assert len(calls) == 1
    for leaf in delta.parts[0].leaves.values():
        whole = getattr(leaf.fill, "whole", None)
        assert whole is None or not whole.held
    before = delta.tensors()[f"{name}/lin/A"].clone()
    with torch.no_grad():
        model.lin.weight.mul_(2)
    delta.redraw(0, seed=0)  # from the weight as it is now
    assert len(calls) == 2
    assert not torch.equal(delta.tensors()[f"{name}/lin/A"], before)


def test_lora_xs_turns_within_the_principal_directions() -> None:
    W, new, _, p = changed("lora_xs(rank=3, alpha=6.0)")
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    wanted = 2.0 * U[:, :3] @ p["R"] @ torch.diag(S[:3]) @ V[:3]
    torch.testing.assert_close(new - W, wanted, rtol=1e-4, atol=1e-5)
    assert api.plan(Tiny(), "lora_xs(rank=3)", at="lin").trainable == 9


def test_the_lower_factor_of_lora_plus_learns_faster() -> None:
    assert [METHODS["lora_plus"]().rate(leaf) for leaf in "AB"] == [1.0, 16.0]
    assert METHODS["lora_plus"](ratio=4.0).rate("B") == 4.0
    (plus,), (plain,) = parse("lora_plus(rank=3)"), parse("lora(rank=3)")
    W, new, _, p = changed("lora_plus(rank=3)")
    assert torch.equal(new, plain.weight(W, None, p)[0])
    assert plus.rank == 3


@pytest.mark.filterwarnings("ignore")  # of PEFT, about CUDA and its own names
def test_waves_are_those_of_peft_where_a_width_is_odd() -> None:
    method = "waveft(coefficients=30, scale=3.0)"
    ours, theirs = with_peft(method, *PARITY[method], inputs=15)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_wave_changes_four_neighbours_and_keeps_its_energy() -> None:
    (method,) = parse("waveft(scale=3.0)")
    for place in (0, 11, 12 * INPUTS, 23 * INPUTS + 15):
        W = torch.zeros(OUTPUTS, INPUTS)
        new, _ = method.weight(W, None, {"c": torch.tensor([2.0]), "places": torch.tensor([place])})
        rows, columns = new.nonzero().unbind(1)
        assert len(rows) == 4 and int(rows.max() - rows.min()) == int(columns.max() - columns.min())
        torch.testing.assert_close(new.norm(), torch.tensor(6.0))


@settings(deadline=None, max_examples=30)
@given(st.integers(6, 40), st.integers(1, 2), st.booleans(), st.integers(0, 9))
def test_mora_reads_pieces_and_lays_them_side_by_side(
    inputs: int, rank: int, rotate: bool, seed: int
) -> None:
    width = int((rank * (inputs + OUTPUTS)) ** 0.5 + 0.5)
    width -= width % 2 if rotate else 0
    (method,) = parse(f"mora(rank={rank}, rotate={rotate})")
    if width > min(inputs, OUTPUTS):
        with pytest.raises(TargetError, match="Choose up to"):
            api.plan(Tiny(inputs), method, at="lin")
        return
    assert api.plan(Tiny(inputs), method, at="lin").trainable == width**2
    random = torch.Generator().manual_seed(seed)
    M, x = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in ((width, width), (inputs,))
    )
    count = -(-inputs // width)
    pieces = [
        torch.stack([x[(n * width + j) % inputs] for j in range(width)]) for n in range(count)
    ]
    if rotate:
        made = torch.cat([M @ turned(piece, n) for n, piece in enumerate(pieces)])
    else:
        made = M @ torch.stack(pieces).sum(0)
    wanted = torch.stack([made[k % len(made)] for k in range(OUTPUTS)])
    y = torch.zeros(1, OUTPUTS, dtype=torch.float64)
    torch.testing.assert_close(method.fast(x[None], y, {"M": M})[0], wanted, rtol=1e-5, atol=1e-5)
    W = torch.zeros(OUTPUTS, inputs, dtype=torch.float64)
    new, _ = method.weight(W, None, {"M": M})
    torch.testing.assert_close(new @ x, wanted, rtol=1e-5, atol=1e-5)


def turned(piece: Tensor, number: int) -> Tensor:
    """RoPE of one position, pair by pair."""
    half, out = len(piece) // 2, piece.clone()
    for j in range(half):
        angle = torch.tensor(number / 10000 ** (2 * j / len(piece)), dtype=torch.float64)
        first, second = piece[j], piece[j + half]
        out[j] = first * angle.cos() - second * angle.sin()
        out[j + half] = second * angle.cos() + first * angle.sin()
    return out


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 20.0), st.floats(1e-3, 1e3), st.integers(0, 9))
def test_delora_is_bounded_and_deaf_to_the_length_of_its_factors(
    bound: float, length: float, seed: int
) -> None:
    (method,) = parse("delora(rank=3)")
    W, random = Tiny().lin.weight.detach(), torch.Generator().manual_seed(seed)
    p = {
        "A": torch.randn(3, INPUTS, generator=random),
        "B": torch.randn(OUTPUTS, 3, generator=random),
        "bound": torch.tensor([bound]),
        "norms": W.norm(dim=0),
    }
    new, _ = method.weight(W, None, p)
    assert float((new - W).norm()) <= bound * float(W.norm(dim=0).max()) * (1 + 1e-5)
    again, _ = method.weight(W, None, {**p, "A": length * p["A"], "B": p["B"] / length})
    torch.testing.assert_close(again, new, rtol=1e-3, atol=1e-4)


def test_delora_bounds_by_the_norms_of_the_weight() -> None:
    p = started("delora(rank=3)")
    torch.testing.assert_close(p["norms"], Tiny().lin.weight.detach().norm(dim=0))
    assert p["bound"].tolist() == [15.0]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, INPUTS), st.integers(0, 9))
def test_randlora_reaches_full_rank(rank: int, seed: int) -> None:
    method = f"randlora(rank={rank})"
    leaves, terms = started(method), -(-INPUTS // rank)
    assert api.plan(Tiny(), method, at="lin").trainable == terms * (rank + INPUTS)
    random = torch.Generator().manual_seed(seed)
    for name in ("u", "v"):
        leaves[name] = torch.randn(leaves[name].shape, generator=random)
    A, B = METHODS["randlora"](rank=rank).factors(leaves)
    assert int(torch.linalg.matrix_rank((B @ A).double())) == INPUTS


def test_pieces_of_vb_lora_are_mixtures_of_the_few_likeliest_vectors() -> None:
    (method,) = parse("vb_lora(rank=2, vectors=7, block=4, chosen=3)")
    random = torch.Generator().manual_seed(0)
    logits, bank = torch.randn(2, 4, 7, generator=random), torch.randn(7, 4, generator=random)
    A, B = method.factors({"A": logits, "B": torch.randn(2, 6, 7), "bank": bank})
    assert A.shape == (2, 16) and B.shape == (24, 2)
    for row in range(2):
        for piece in range(4):
            order = logits[row, piece].argsort(descending=True)[:3]
            shares = logits[row, piece][order].exp()
            wanted = (shares / shares.sum()) @ bank[order]
            torch.testing.assert_close(A[row, 4 * piece : 4 * piece + 4], wanted)


def test_the_bank_is_one_for_all_sites() -> None:
    delta = api.attach(
        FAMILIES["bert"].build(), "vb_lora(rank=2, vectors=6, block=4)", at="attention.q"
    )
    assert sum(name.endswith("/bank") for name in delta.tensors()) == 1
    assert sum(name.endswith("/A") for name in delta.tensors()) > 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.floats(0.5, 20.0), st.integers(0, 9))
def test_l_lora_is_the_tangent_of_lora_where_it_begins(rank: int, alpha: float, seed: int) -> None:
    """What an adapted map gives, linearised in the leaves: for every x, so that weights agree."""
    random = torch.Generator().manual_seed(seed)
    (lora,) = parse(f"lora(rank={rank}, alpha={alpha})")
    (preset,) = parse("l_lora")
    frozen = dataclasses.replace(preset, rank=rank, alpha=alpha)
    W, x, A0, A, B, B0 = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in (
            *((OUTPUTS, INPUTS), (5, INPUTS), (rank, INPUTS), (rank, INPUTS)),
            *((OUTPUTS, rank), (OUTPUTS, rank)),
        )
    )

    def tangent(B0: Tensor) -> Tensor:
        def output(p: Leaves) -> Tensor:
            return lora.fast(x, x @ W.mT, p)

        start, way = {"A": A0, "B": B0}, {"A": A - A0, "B": B - B0}
        at_start, moved = torch.func.jvp(output, (start,), (way,))
        return at_start + moved

    ours = frozen.fast(x, x @ W.mT, {"A": A0, "B": B})
    torch.testing.assert_close(tangent(torch.zeros_like(B)), ours)
    new, _ = frozen.weight(W, None, {"A": A0, "B": B})
    torch.testing.assert_close(ours, x @ new.mT)
    # The identity is one of this start: elsewhere A moves the tangent, too.
    more = lora.scale * x @ (B0 @ (A - A0)).mT
    torch.testing.assert_close(tangent(B0), ours + more)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_l_lora_is_trained_as_the_tangent_is() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, INPUTS, generator=random), torch.randn(12, OUTPUTS, generator=random)
    model = Tiny()
    delta = api.attach(model, "l_lora", at="lin")
    (lora,) = parse("lora")
    A, B = (delta.tensors()[name].clone() for name in sorted(delta.tensors()))
    start, way = {"A": A, "B": B}, {"A": torch.zeros_like(A), "B": torch.zeros_like(B)}
    base = model.lin(x).detach()

    def loss(way: Leaves) -> Tensor:
        at_start, moved = torch.func.jvp(lambda p: lora.fast(x, base, p), (start,), (way,))
        return (at_start + moved - y).square().mean()

    for _ in range(5):
        gradients = torch.func.grad(loss)(way)
        assert not gradients["A"].any()
        way = {name: value - 0.5 * gradients[name] for name, value in way.items()}
        (gradient,) = torch.autograd.grad((model(x) - y).square().mean(), delta.bank.slots)
        with torch.no_grad():
            delta.bank.slots[0].sub_(0.5 * gradient)
    held = {name.rpartition("/")[2]: value for name, value in delta.tensors().items()}
    torch.testing.assert_close(held["B"], way["B"])
    assert held["B"].abs().max() > 0.05 and torch.equal(held["A"], A)


@pytest.mark.parametrize("shared", [0, 2])
def test_heads_have_differences_of_their_own(shared: int) -> None:
    W, new, _, p = changed(f"kernel_mix(heads=4, rank=2, shared={shared})")
    wanted = torch.cat([B @ A for A, B in zip(p["A"].split(2), p["B"].split(6), strict=True)])
    if shared:
        wanted = wanted + p["shared_B"] @ p["shared_A"]
    torch.testing.assert_close(new - W, wanted, rtol=1e-4, atol=1e-5)


def test_at_the_output_of_an_attention_heads_are_columns() -> None:
    model = FAMILIES["bert"].build()
    delta = api.attach(model, "kernel_mix(heads=4, rank=2)", at="attention.output")
    (site, *_), (names, *_) = delta.parts[0].sites, delta.parts[0].names
    move(delta)
    p = {name: delta.tensors()[full] for name, full in names.items()}
    assert p["A"].shape == (2, 32) and p["B"].shape == (32, 8)
    heads = zip(p["A"].split(8, dim=1), p["B"].split(2, dim=1), strict=True)
    wanted = site.weight().detach() + torch.cat([B @ A for A, B in heads], dim=1)
    delta.merge()
    torch.testing.assert_close(site.module.weight.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("pissa(rank=17)", TargetError, "adds nothing to 16. Choose 1 to 16"),
        ("milora(rank=0)", ConfigurationError, "at least 1"),
        ("lora_xs(rank=17)", TargetError, "adds nothing to 16. Choose 1 to 16"),
        ("lora_plus(ratio=0.0)", ConfigurationError, "above 0"),
        ("mora(rank=0)", ConfigurationError, "at least 1"),
        ("mora(rank=7)", TargetError, "17 wide at lin, whose smaller width is 16. Choose up to 6"),
        ("randlora(rank=17)", TargetError, "Choose 1 to 16"),
        ("delora(rank=17)", TargetError, "Choose 1 to 16"),
        ("vb_lora(chosen=300)", ConfigurationError, "chosen from 1 to vectors"),
        ("vb_lora", TargetError, "Choose one of 1, 2, 4, 8, 16"),
        ("vb_lora(rank=17)", TargetError, "Choose 1 to 16"),
        ("kernel_mix(heads=5)", TargetError, "one of 1, 2, 3, 4, 6, 8, 12, 24"),
        ("kernel_mix(heads=4, rank=7)", TargetError, "features of one as the rank"),
        ("kernel_mix(shared=-1)", ConfigurationError, "shared from 0"),
        ("road(variant=3)", ConfigurationError, "variant is 1, 2 or 4"),
        ("waveft(coefficients=0)", ConfigurationError, "at least 1"),
        ("waveft", TargetError, "has 384 coefficients"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        api.attach(Tiny(), method, at="lin")
