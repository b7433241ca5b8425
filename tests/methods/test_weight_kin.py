"""Kin of LoRA that begin in the weight, share or bound it: against PEFT 0.21 and their papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.linear_map import INPUTS, Tiny, changed
from torch import Tensor

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.grammar import parse
from deltatune.core.method import METHODS

SPECTRAL = ("pissa", "milora", "olora")


def started(method: str, model: Tiny | None = None) -> dict[str, Tensor]:
    """The leaves of a fresh delta on one linear map."""
    delta = api.attach(Tiny() if model is None else model, method, at="lin")
    return {name.rpartition("/")[2]: value for name, value in delta.tensors().items()}


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


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("pissa(rank=17)", TargetError, "adds nothing to 16. Choose 1 to 16"),
        ("milora(rank=0)", ConfigurationError, "at least 1"),
        ("lora_xs(rank=17)", TargetError, "adds nothing to 16. Choose 1 to 16"),
        ("lora_plus(ratio=0.0)", ConfigurationError, "above 0"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        api.attach(Tiny(), method, at="lin")
