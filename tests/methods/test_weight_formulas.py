"""Methods that change a weight against PEFT 0.21, and against what their papers say of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.linear_map import (
    INPUTS,
    OUTPUTS,
    Leaves,
    Map,
    Tiny,
    changed,
    output,
    with_peft,
)
from torch import Tensor, nn
from torch.nn import functional

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.grammar import parse
from deltatune.primitives.blocks import cayley, skew


def gralora(p: Leaves) -> Leaves:
    """PEFT lays the ranks of a row of blocks side by side."""
    A, B = (p[name].unflatten(d, (2, 2)) for name, d in (("gralora_A", 2), ("gralora_B", 1)))
    return {"A": A.permute(2, 0, 3, 1), "B": B.permute(0, 1, 3, 2)}


PAIR = {"lora_A": "A", "lora_B": "B"}
DRAWN = {"init_lora_weights": False, "init_weights": None}  # the words of its LoraConfig alone
PARITY: dict[str, tuple[str, dict[str, Any], Map]] = {
    "dora(rank=3, alpha=6.0)": (
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 6,
            "use_dora": True,
            "init_lora_weights": False,
            "init_weights": None,
        },
        {**PAIR, "lora_magnitude_vector": "m"},
    ),
    "rslora(rank=4, alpha=6.0)": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "init_lora_weights": False,
            "init_weights": None,
        },
        PAIR,
    ),
    "loha(rank=3, alpha=6.0)": (
        "LoHaConfig",
        {"r": 3, "alpha": 6},
        {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
    ),
    "lokr(rank=1, alpha=2.0, factor=4)": (
        "LoKrConfig",
        {"r": 1, "alpha": 2, "decompose_factor": 4},
        {"lokr_w1": "C", "lokr_w2_a": "B", "lokr_w2_b": "A"},
    ),
    "vera(rank=5)": (
        "VeraConfig",
        {"r": 5},
        {"vera_lambda_b": "b", "vera_lambda_d": "d", "vera_A": "A", "vera_B": "B"},
    ),
    "hra(rank=4)": ("HRAConfig", {"r": 4}, lambda p: {"u": p["hra_u"].mT}),
    "oft(block=4)": (
        "OFTConfig",
        {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False},
        lambda p: {"Q": -p["oft_R"]},
    ),
    "boft(block=4)": (
        "BOFTConfig",
        {"boft_block_size": 4},
        lambda p: {"Q": -p["boft_R"], "s": p["boft_s"][:, 0]},
    ),
    "ia3": (
        "IA3Config",
        {"feedforward_modules": [], "init_ia3_weights": False, "init_weights": None},
        lambda p: {"out": p["ia3_l"][:, 0]},
    ),
    "fourierft(frequencies=10, scale=30.0)": (
        "FourierFTConfig",
        {"n_frequency": 10, "scaling": 30.0},
        {"fourierft_spectrum": "c", "places": "places"},
    ),
    "c3a(block=8)": ("C3AConfig", {"block_size": 8}, {"c3a_kernel": "w"}),
    "miss(rank=4)": ("MissConfig", {"r": 4}, {"miss_block": "D"}),
    "road(group=8)": (
        "RoadConfig",
        {"variant": "road_1", "group_size": 8},
        {"road_theta": "theta", "road_alpha": "alpha"},
    ),
    "gralora(rank=4, alpha=8.0)": (
        "GraloraConfig",
        {"r": 4, "gralora_k": 2, "alpha": 8},
        gralora,
    ),
    "hira(rank=3, alpha=3.0)": ("HiraConfig", {"r": 3}, {"hira_A": "A", "hira_B": "B"}),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about CUDA and its own names
@pytest.mark.parametrize("method", PARITY)
def test_the_output_is_that_of_peft(method: str) -> None:
    ours, theirs = with_peft(method, *PARITY[method])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["oft(block=4)", "hra(rank=4)", "hra(rank=2)"])
def test_rotations_leave_lengths_and_angles_of_the_rows(method: str) -> None:
    W, new, _, _ = changed(method)
    assert (new - W).norm() > 0.1
    torch.testing.assert_close(new @ new.mT, W @ W.mT, rtol=1e-4, atol=1e-5)


def test_butterflies_join_every_feature_with_every_other() -> None:
    model = Tiny(16, 16)
    nn.init.eye_(model.lin.weight)
    for depth, dense in ((1, 4 / 16), (2, 8 / 16), (3, 1.0)):
        delta = api.attach(model, f"boft(block=4, depth={depth})", at="lin")
        with torch.no_grad():
            for name, leaf in delta.bank.read(0).items():
                if name.endswith("Q"):
                    leaf.normal_(generator=torch.Generator().manual_seed(3))
            R = model(torch.eye(16)) - model.lin.bias
        delta.detach()
        torch.testing.assert_close(R @ R.mT, torch.eye(16), rtol=1e-4, atol=1e-5)
        assert float((R.abs() > 1e-7).float().mean()) == dense


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 9))
def test_cayley_gives_rotations(size: int, seed: int) -> None:
    entries = torch.randn(
        3, size * (size - 1) // 2, generator=torch.Generator().manual_seed(seed)
    ).double()
    Q = skew(entries, size)
    torch.testing.assert_close(Q, -Q.mT)
    R = cayley(Q)
    torch.testing.assert_close(R @ R.mT, torch.eye(size).double().expand_as(R))
    assert torch.equal(cayley(torch.zeros_like(Q)), torch.eye(size).double().expand_as(R))


def test_c3a_is_a_circular_convolution() -> None:
    W, new, _, p = changed("c3a(block=8)")
    x = torch.randn(INPUTS, generator=torch.Generator().manual_seed(4))
    pieces = torch.fft.rfft(x.view(-1, 8))
    wanted = (
        torch.fft.irfft((torch.fft.rfft(p["w"]).conj() * pieces).sum(1), n=8).flatten() / INPUTS
    )
    torch.testing.assert_close((new - W) @ x, wanted, rtol=1e-4, atol=1e-5)


def test_sums_and_products_are_those_of_the_papers() -> None:
    W, new, _, p = changed("multilora(rank=2, alpha=6.0, terms=3)")
    terms = zip(p["A"].split(2), p["B"].split(2, dim=1), p["gain"].unbind(1), strict=True)
    wanted = sum((3.0 * g[:, None] * (B @ A) for A, B, g in terms), torch.zeros_like(W))
    torch.testing.assert_close(new - W, wanted, rtol=1e-4, atol=1e-5)

    W, new, _, p = changed("miss(rank=5)")
    x = torch.randn(INPUTS, generator=torch.Generator().manual_seed(5))
    pieces = functional.pad(x, (0, 4)).view(-1, 5).sum(0)
    torch.testing.assert_close((new - W) @ x, pieces @ p["D"], rtol=1e-4, atol=1e-5)

    W, new, _, p = changed("krona")
    torch.testing.assert_close(new - W, torch.kron(p["A"], p["B"]))
    assert p["A"].shape == (4, 4) and p["B"].shape == (6, 4)

    W, new, b, p = changed("hadamard")
    torch.testing.assert_close(new, p["w"][:, None] * W)
    torch.testing.assert_close(b, p["w"] * Tiny().lin.bias + p["e"])


def test_road_turns_pairs_and_keeps_their_lengths() -> None:
    leaves = {"theta": torch.full((12,), 0.7), "alpha": torch.ones(12)}
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(6)).double()
    y, before = output("road(group=8)", leaves, x), Tiny().double()(x)

    def lengths(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, 2, 4)).norm(dim=-2)

    torch.testing.assert_close(lengths(y), lengths(before))
    assert (y - before).abs().max() > 0.1


def test_one_coefficient_has_the_energy_of_its_wave() -> None:
    W, new, _, _ = changed("fourierft(frequencies=1, scale=150.0)")
    leaves = {"c": torch.tensor([2.0]), "places": torch.tensor([3])}
    (method,) = parse("fourierft(frequencies=1, scale=150.0)")
    new, _ = method.weight(W, None, leaves)
    energy = 150.0**2 * 2.0**2 / (2 * INPUTS * OUTPUTS)
    assert float((new - W).square().sum()) == pytest.approx(energy, rel=1e-4)


def test_shira_changes_so_many_entries() -> None:
    W, new, _, p = changed("shira(rank=2)")
    assert int((new != W).sum()) == p["S"].numel() == 2 * (INPUTS + OUTPUTS)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(2, 8), st.integers(0, 9))
def test_zero_points_of_groups_take_up_qa_lora(group: int, bits: int, seed: int) -> None:
    """W' of a base of codes, scales and zero points is that of the same codes and scales."""
    rank, groups = 2, INPUTS // group
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (OUTPUTS, groups, group))
    scales = random.uniform(0.1, 1.0, (OUTPUTS, groups, 1))
    zeros = random.uniform(0, 2**bits, (OUTPUTS, groups, 1))
    A, B = random.normal(size=(rank, groups)), random.normal(size=(OUTPUTS, rank))
    W = (scales * (codes - zeros)).reshape(OUTPUTS, INPUTS)
    (method,) = parse(f"qa_lora(rank={rank}, alpha=6.0, group={group})")
    leaves = {"A": torch.tensor(A), "B": torch.tensor(B)}
    new, _ = method.weight(torch.tensor(W), None, leaves)
    moved = zeros - 3.0 * (B @ A)[:, :, None] / scales
    wanted = (scales * (codes - moved)).reshape(OUTPUTS, INPUTS)
    np.testing.assert_allclose(new.numpy(), wanted, rtol=1e-10, atol=1e-10)
    # Algorithm 1 of the paper: what is pooled is a mean times its size.
    x = random.normal(size=(5, INPUTS))
    pooled = x.reshape(5, groups, group).mean(axis=2) * group
    added = method.fast(torch.tensor(x), torch.zeros(5, OUTPUTS, dtype=torch.float64), leaves)
    np.testing.assert_allclose(added.numpy(), 3.0 * pooled @ A.T @ B.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("lora(rank=17)", TargetError, "adds nothing to 16. Choose 1 to 16"),
        ("oft(block=5)", TargetError, "Choose one of 1, 2, 4, 8, 16"),
        ("c3a(block=16)", TargetError, "Choose one of 1, 2, 3, 4, 6, 8, 12, 24"),
        ("boft(block=4, depth=4)", TargetError, "in blocks"),
        ("boft(block=3)", ConfigurationError, "even block"),
        ("lokr(factor=5)", TargetError, "or 0 for the factors nearest"),
        ("krona(factor=7)", TargetError, "7 does not divide"),
        ("gralora(rank=3)", ConfigurationError, "multiple of blocks=2"),
        ("gralora(rank=5, blocks=5)", TargetError, "does not divide both widths"),
        ("hra(rank=3)", ConfigurationError, "even number"),
        ("road(group=16)", TargetError, "Choose one of"),
        ("road(group=3)", ConfigurationError, "even number"),
        ("shira(rank=99)", TargetError, "Choose 1 to 9"),
        ("fourierft(frequencies=999)", TargetError, "has 384 frequencies"),
        ("vera(rank=0)", ConfigurationError, "at least 1"),
        ("qa_lora(group=5)", TargetError, "Choose one of 1, 2, 4, 8, 16"),
        ("qa_lora(rank=5, group=4)", TargetError, "reads 4 groups of 4 .* smaller rank or group"),
        ("miss(rank=0)", ConfigurationError, "at least 1"),
        ("multilora(terms=0)", ConfigurationError, "at least 1"),
        ("compacter(up_std=0.1)", ConfigurationError, "up_std has no meaning"),
        ("low_rank_adapter(rank=0)", ConfigurationError, "at least 1"),
        ("adapter_drop(dropped=-1)", ConfigurationError, "0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        api.attach(Tiny(), method, at="lin")
