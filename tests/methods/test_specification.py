"""Methods that tune a chosen subset of the parameters, and projections of all of them."""

from __future__ import annotations

import pickle
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
from deltatune.methods.trainable_tokens import TrainableTokens
from deltatune.primitives.fastfood import Fastfood, walsh_hadamard
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


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("gpt2", {"transformer.wte", "lm_head"}),
        ("t5", {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
        ("llama", {"model.embed_tokens"}),
        ("bert", {"bert.embeddings.word_embeddings"}),
    ],
)
def test_tokens_are_tuned_where_their_table_is_used(family: str, paths: set[str]) -> None:
    kin = FAMILIES[family]
    model, native = kin.build(), kin.build()
    delta = api.attach(model, "trainable_tokens(tokens='5, 90:95')")
    assert {link.site.path for link in delta.links} == paths
    assert delta.bank.numel == 6 * 32
    move(delta)
    (moved,) = (v for n, v in delta.tensors().items() if n.endswith("weight"))
    with torch.no_grad():
        native.get_input_embeddings().weight[[5, 90, 91, 92, 93, 94]] += moved
    batch = kin.batch()
    batch["input_ids"][0, :3] = torch.tensor([5, 94, 95])
    close(kin.logits(model, batch), kin.logits(native, batch))


@pytest.mark.filterwarnings("ignore")  # of PEFT, about names of transformers
def test_tokens_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    kin = FAMILIES["gpt2"]
    ours = kin.build()
    delta = api.attach(ours, "trainable_tokens(tokens='7, 30:33')")
    move(delta)
    (moved,) = (v for n, v in delta.tensors().items() if n.endswith("weight"))
    config = peft.TrainableTokensConfig(token_indices=[7, 30, 31, 32], target_modules=["wte"])
    theirs = peft.get_peft_model(kin.build(), config)
    (rows,) = (p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n)
    with torch.no_grad():
        rows += moved
    assert delta.bank.numel == rows.numel()
    batch = kin.batch()
    batch["input_ids"][0, :4] = torch.tensor([7, 30, 31, 32])
    close(kin.logits(ours, batch), kin.logits(theirs, batch))


@pytest.mark.parametrize("tokens", ["5,", " ", "5;6", "-1", "5:", "7:7", "9:7", "5, 4:6", "²"])
def test_tokens_are_read_strictly(tokens: str) -> None:
    with pytest.raises(ConfigurationError, match="trainable_tokens: tokens"):
        TrainableTokens(tokens=tokens)


def test_a_token_beyond_the_table_is_refused_and_none_at_all() -> None:
    with pytest.raises(ConfigurationError, match="no token is named"):
        api.plan(FAMILIES["bert"].build(), "trainable_tokens")
    for tokens, at in (("97", "embedding"), ("0:99999999999999", "embedding"), ("3", "head")):
        with pytest.raises(TargetError, match="Choose 0 to"):
            api.plan(FAMILIES["bert"].build(), TrainableTokens(tokens=tokens, at=at))


def dense(size: int) -> Tensor:
    """The Walsh-Hadamard matrix by its definition: signs are parities of common bits."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10), st.integers(0, 9))
def test_the_fast_transform_is_the_dense_matrix_and_its_own_inverse(power: int, seed: int) -> None:
    size = 2**power
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(walsh_hadamard(x), x @ dense(size))
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), size * x)


def test_the_fast_transform_refuses_other_sizes() -> None:
    for size in (0, 3, 12):
        with pytest.raises(ValueError, match="1, 2, 4"):
            walsh_hadamard(torch.zeros(2, size))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 9))
def test_a_projection_is_its_formula_and_the_gradient_its_adjoint(
    entries: int, inputs: int, seed: int
) -> None:
    P = Fastfood(entries, inputs, seed)
    signs, order, gains = P.drawn()
    H = dense(P.length)
    matrix = H @ torch.diag(gains.double()) @ torch.eye(P.length).double()[order.long()] @ H
    matrix = matrix @ torch.diag(signs.double())
    torch.testing.assert_close(matrix.norm(dim=1), torch.ones(P.length).double())
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(inputs, generator=random, dtype=torch.float64, requires_grad=True)
    v = torch.randn(entries, generator=random, dtype=torch.float64)
    projected = P(z)
    torch.testing.assert_close(projected, matrix[:entries, :inputs] @ z)
    (back,) = torch.autograd.grad(projected @ v, z)
    torch.testing.assert_close((projected @ v).detach(), back @ z.detach())
    torch.testing.assert_close(back, matrix[:entries, :inputs].mT @ v)
    assert torch.equal(Fastfood(entries, inputs, seed)(z), projected)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_every_parameter_moves_within_one_subspace(family: str, said: bool) -> None:
    kin = FAMILIES[family]
    model, native = kin.build(), kin.build().requires_grad_(False)
    base = kin.logits(native, kin.batch())
    named = dict(native.named_parameters())
    delta = api.attach(model, f"intrinsic(dimension=400, said={said}, seed=3)")
    assert delta.bank.numel == 400
    z = delta.bank.read(0)["intrinsic/all/z"]
    assert z.numel() == 400 - (len(named) if said else 0)
    with torch.inference_mode():  # what is drawn here trains below
        assert torch.equal(kin.logits(model, kin.batch()), base)
    move(delta)
    held = delta.tensors()
    with torch.no_grad():
        for part in delta.parts:
            done = set[int]()
            for site, forms in zip(part.sites, part.forms, strict=True):
                for name in forms:
                    parameter = native.get_submodule(site.path).get_parameter(name)
                    if id(parameter) in done:
                        continue
                    done.add(id(parameter))
                    P = Fastfood(parameter.numel(), z.numel(), 3, f"{site.name}.{name}")
                    scale = held[f"intrinsic/{site.name}/{name}.scale"] if said else 1.0
                    parameter += scale * P(held["intrinsic/all/z"]).view_as(parameter)
            assert len(done) == len(named)
    torch.testing.assert_close(
        kin.logits(model, kin.batch()), kin.logits(native, kin.batch()), rtol=1e-3, atol=1e-4
    )
    kin.logits(model, kin.batch()).square().sum().backward()
    (slot,) = delta.bank.slots
    assert slot.grad is not None and (slot.grad != 0).double().mean() > 0.9


def test_projections_are_kept_once_and_go_into_no_copy() -> None:
    kin = FAMILIES["gpt2"]
    model = kin.build()
    delta = api.attach(model, "intrinsic(dimension=400)")
    kin.logits(model, kin.batch())
    (part,) = delta.parts
    forms = {site.name: forms["weight"] for site, forms in zip(part.sites, part.forms, strict=True)}
    held = vars(forms["lm_head"])["projection"]
    assert held is vars(forms["transformer.wte"])["projection"]
    z = torch.ones(held.inputs)
    first = held(z)
    kept = held._held[z.device]
    assert torch.equal(held(z), first) and held._held[z.device] is kept
    again = pickle.loads(pickle.dumps(held))
    assert again._held == {} and torch.equal(again(z), first)


def test_a_dimension_that_the_scales_eat_up_is_refused() -> None:
    tensors = sum(1 for _ in FAMILIES["bert"].build().parameters())
    with pytest.raises(TargetError, match=f"Choose {tensors + 1} or more, or said=False"):
        api.plan(FAMILIES["bert"].build(), f"intrinsic(dimension={tensors})")
    assert api.plan(FAMILIES["bert"].build(), f"intrinsic(dimension={tensors + 1})").sites
    with pytest.raises(ConfigurationError, match="at least 1"):
        api.plan(FAMILIES["bert"].build(), "intrinsic(dimension=0)")
