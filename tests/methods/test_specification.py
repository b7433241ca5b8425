"""Methods that tune a chosen subset of the parameters, and projections of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.methods.masking import Masking
from deltatune.methods.random_subset import RandomSubset, _split
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.data())
def test_a_split_spends_the_count_and_no_tensor_is_overdrawn(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, sum(sizes)))
    found = _split(count, tuple(sizes), data.draw(st.integers(0, 9)))
    assert sum(found) == count
    assert all(0 <= one <= size for one, size in zip(found, sizes, strict=True))


def test_a_split_is_hypergeometric() -> None:
    sizes, count, draws = [3, 5, 12], 8, 4000
    found = torch.tensor([_split(count, tuple(sizes), k) for k in range(draws)]).double()
    shares = torch.tensor(sizes).double() / 20
    variance = count * shares * (1 - shares) * (20 - count) / (20 - 1)
    torch.testing.assert_close(found.mean(0), count * shares, rtol=0, atol=0.08)
    torch.testing.assert_close(found.var(0), variance, rtol=0.1, atol=0)


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2", "llama"])
def test_a_random_subset_is_a_share_of_all_parameters_and_no_other_moves(family: str) -> None:
    kin = FAMILIES[family]
    model, native = kin.build(), kin.build()
    delta = api.attach(model, "random_subset(share=0.01)")
    planned = api.plan(native, "random_subset(share=0.01)")
    wanted = sum(p.numel() for p in native.parameters()) // 100
    assert delta.bank.numel == planned.trainable == wanted
    assert planned.stored == 2 * wanted
    move(delta)
    changed = 0
    for name, value in delta.tensors().items():
        if name.endswith(".indices"):
            _, path, leaf = name.removesuffix(".indices").split("/")
            assert value.unique().numel() == value.numel()
            parameter = native.get_submodule(path).get_parameter(leaf)
            with torch.no_grad():
                parameter.view(-1)[value] += delta.tensors()[name.removesuffix(".indices")]
            changed += value.numel()
    assert changed == wanted
    close(kin.logits(model, kin.batch()), kin.logits(native, kin.batch()))


class Pair(nn.Module):
    """Two maps, in either order."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleDict({name: nn.Linear(30, 30) for name in (first, second)})

    def forward(self, x: Tensor) -> Tensor:
        for name in sorted(self.maps):
            x = self.maps[name](x)
        return x


def test_the_set_depends_on_seed_and_names_alone() -> None:
    def held(method: str, *names: str, seed: int = 0) -> dict[str, list[int]]:
        tensors = api.attach(Pair(*names), method, seed=seed).tensors()
        return {n: value.tolist() for n, value in tensors.items() if n.endswith("indices")}

    method = "random_subset(share=0.1)"
    one = held(method, "a", "b")
    assert one == held(method, "b", "a") == held(method, "a", "b", seed=4)
    assert one != held("random_subset(share=0.1, seed=1)", "a", "b")
    everything = api.attach(Pair("a", "b"), "random_subset(share=1.0)")
    assert everything.bank.numel == 2 * (900 + 30)


def test_a_budget_that_is_empty_is_refused() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ConfigurationError, match=r"share must lie in \(0, 1\]"):
            RandomSubset(share=share)
    with pytest.raises(TargetError, match=r"of 1860 entries is none. Choose 0.00054 or more"):
        api.plan(Pair("a", "b"), "random_subset(share=0.0001)")


def test_a_mask_is_trained_through_and_saved_as_bits(tmp_path: Path) -> None:
    model = Pair("a", "b")
    W = model.maps["b"].weight.detach().clone()
    delta = api.attach(model, "masking(sparsity=0.25)", at="b")
    (m,) = delta.bank.read(0).values()
    assert float((m < 0.01).double().mean()) == pytest.approx(0.25, abs=0.05)
    move(delta)
    x = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    hidden = model.maps["a"](x).detach()
    y = model(x)
    kept = m.detach() >= 0.01
    close(y, hidden @ (W * kept).mT + model.maps["b"].bias)
    y.square().sum().backward()
    straight = (2 * y.detach()).mT @ hidden * W
    (slot,) = delta.bank.slots
    assert slot.grad is not None
    close(slot.grad.view_as(W), straight)

    folder = api.save(delta, tmp_path / "mask")
    (stored,) = api.load(folder, Pair("a", "b")).tensors().values()
    assert stored.dtype == torch.uint8 and stored.numel() == -(-900 // 8)
    assert numpy.unpackbits(stored.numpy(), bitorder="little")[:900].tolist() == [
        int(one) for one in kept.flatten()
    ]
    delta.merge()
    assert torch.equal(model.maps["b"].weight, W * kept)


def test_a_mask_with_all_on_is_the_base() -> None:
    kin = FAMILIES["gpt2"]
    base = kin.logits(kin.build(), kin.batch())
    for method in ("masking(sparsity=0.0)", "masking(packed=True)"):
        model = kin.build()
        api.attach(model, method)
        assert torch.equal(kin.logits(model, kin.batch()), base)
    with pytest.raises(ConfigurationError, match="a packed mask has no scores"):
        Masking(packed=True, sparsity=0.2)
    with pytest.raises(ConfigurationError, match=r"sparsity must lie in \[0, 1\)"):
        Masking(sparsity=1.0)
