"""Mixtures of deltas, and deltas that share or leave out, against their formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.methods.linear_map import INPUTS, OUTPUTS, Leaves, Tiny, output
from torch import Tensor

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.grammar import parse
from deltatune.core.policy import Draws
from deltatune.methods import AdaMix, AdapterDropRobust, AdapterFusion, Poly, ProPETL
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES


def drawn(seed: int, **shapes: tuple[int, ...]) -> Leaves:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }


X = drawn(7, x=(2, 5, INPUTS))["x"]


def base() -> tuple[Tensor, Tensor]:
    """The weight and the bias of the map."""
    map_ = Tiny().double().lin
    return map_.weight.detach(), map_.bias.detach()


def close(found: Tensor, expected: Tensor) -> None:
    # Leaves are kept in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- routed mixtures


def gates(x: Tensor, R: Tensor, chosen: int) -> Tensor:
    """One token's weights, by hand."""
    logits = [float(row @ x) for row in R]
    kept = sorted(range(len(logits)), key=lambda n: -logits[n])[: chosen or len(logits)]
    total = sum(torch.tensor(logits[n], dtype=torch.float64).exp() for n in kept)
    found = torch.zeros(len(logits), dtype=torch.float64)
    for n in kept:
        found[n] = torch.tensor(logits[n], dtype=torch.float64).exp() / total
    return found


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_molora_weighs_its_experts_for_every_token(chosen: int) -> None:
    p = drawn(1, A=(3, 2, INPUTS), B=(3, OUTPUTS, 2), R=(3, INPUTS))
    found = output(f"molora(rank=2, experts=3, alpha=6.0, chosen={chosen})", p, X)
    W, b = base()
    for row, x in zip(found.flatten(0, 1), X.flatten(0, 1), strict=True):
        g = gates(x, p["R"], chosen)
        added = [g[n] * 3.0 * (p["B"][n] @ (p["A"][n] @ x)) for n in range(3)]
        close(row, W @ x + b + torch.stack(added).sum(0))


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_mov_mixes_gains_for_every_token(chosen: int) -> None:
    p = drawn(2, l=(3, OUTPUTS), R=(3, INPUTS))
    found = output(f"mov(experts=3, chosen={chosen})", p, X)
    W, b = base()
    for row, x in zip(found.flatten(0, 1), X.flatten(0, 1), strict=True):
        gain = gates(x, p["R"], chosen) @ (1 + p["l"])
        close(row, gain * (W @ x + b))


def test_experts_that_are_alike_need_no_router() -> None:
    p = drawn(3, A=(2, INPUTS), B=(OUTPUTS, 2), R=(3, INPUTS))
    many = {"A": p["A"].repeat(3, 1, 1), "B": p["B"].repeat(3, 1, 1), "R": p["R"]}
    alone = output("lora(rank=2, alpha=4.0)", p, X)
    close(output("molora(rank=2, experts=3, alpha=4.0)", many, X), alone)
    one = {"A": p["A"][None], "B": p["B"][None], "R": p["R"][:1]}
    close(output("molora(rank=2, experts=1, alpha=4.0)", one, X), alone)


@pytest.mark.parametrize(
    "text",
    [
        "moelora(rank=4, experts=3)",
        "molora(experts=0)",
        "molora(rank=0)",
        "molora(experts=3, chosen=4)",
        "mov(chosen=-1)",
    ],
)
def test_mixtures_refuse_numbers_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse(text)


# ---- mixtures for a task


def test_poly_mixes_factors_and_not_products() -> None:
    p = drawn(4, A=(3, 2, INPUTS), B=(3, OUTPUTS, 2), Z=(3,))
    W, b = base()
    on = 1 / (1 + (-p["Z"]).exp())
    z = on / on.sum()
    A, B = (torch.stack([z[n] * p[name][n] for n in range(3)]).sum(0) for name in "AB")
    close(output("poly(rank=2, experts=3, alpha=6.0)", p, X), X @ (W + 3.0 * B @ A).mT + b)


def test_poly_s_noise_is_logistic_and_of_a_step_and_a_site() -> None:
    method = Poly(rank=2, experts=4)
    (site,) = (link.site for link in api.attach(Tiny(), method, at="lin").links)
    p = {"Z": torch.full((4,), 0.5)}
    noise = torch.stack([method.sample(site, p, Draws(3, k))["Z"] - 0.5 for k in range(2000)])
    assert torch.equal(noise[7], method.sample(site, p, Draws(3, 7))["Z"] - 0.5)
    assert not torch.equal(noise[7], method.sample(site, p, Draws(4, 7))["Z"] - 0.5)
    for level in (0.1, 0.5, 0.9):
        quantile = math.log(level / (1 - level))
        assert abs(float((noise < quantile).float().mean()) - level) < 0.02


def test_moelora_parts_the_rank_among_its_experts() -> None:
    p = drawn(5, A=(4, INPUTS), B=(OUTPUTS, 4), G=(2, 3), e=(3,))
    W, b = base()
    logits = [float(p["G"][n] @ p["e"]) for n in range(2)]
    g = [math.exp(one) / sum(map(math.exp, logits)) for one in logits]
    parts = [g[n] * p["B"][:, 2 * n : 2 * n + 2] @ p["A"][2 * n : 2 * n + 2] for n in range(2)]
    found = output("moelora(rank=4, experts=2, embedding=3, alpha=6.0)", p, X)
    close(found, X @ (W + 1.5 * (parts[0] + parts[1])).mT + b)


# ---- AdaMix


def bottleneck(y: Tensor, D: Tensor, c: Tensor, U: Tensor, e: Tensor) -> Tensor:
    return (y @ D.mT + c).clamp(min=0.0) @ U.mT + e


def adamix_leaves(up: int) -> Leaves:
    return drawn(6, D=(3, 2, OUTPUTS), c=(3, 2), U=(up, OUTPUTS, 2), e=(up, OUTPUTS))


def mean(p: Leaves) -> Leaves:
    return {name: leaf.mean(0) for name, leaf in p.items()}


@pytest.mark.parametrize("shared", [True, False])
def test_adamix_is_one_adapter_in_evaluation(shared: bool) -> None:
    p = adamix_leaves(1 if shared else 3)
    W, b = base()
    y = X @ W.mT + b
    found = output(f"adamix(experts=3, bottleneck=2, shared_up={shared})", p, X)
    close(found, y + bottleneck(y, **mean(p)))
    close(found, output("pfeiffer(bottleneck=2)", mean(p), X))


@pytest.mark.parametrize("shared", [True, False])
def test_adamix_draws_its_maps_apart_anew_in_every_step(shared: bool) -> None:
    method = AdaMix(experts=3, bottleneck=2, shared_up=shared)
    p = adamix_leaves(1 if shared else 3)
    (site,) = (link.site for link in api.attach(Tiny(), method, at="lin").links)
    seen = set()
    for step in range(120):
        taken = method.sample(site, p, Draws(3, step))
        (k,) = (k for k in range(3) if torch.equal(taken["D"][0], p["D"][k]))
        (u,) = (u for u in range(len(p["U"])) if torch.equal(taken["U"][0], p["U"][u]))
        assert torch.equal(taken["c"][0], p["c"][k]) and torch.equal(taken["e"][0], p["e"][u])
        y = drawn(step, y=(4, OUTPUTS))["y"]
        expected = y + bottleneck(y, p["D"][k], p["c"][k], p["U"][u], p["e"][u])
        close(method.output(y, y, taken), expected)
        seen.add((k, u))
    assert len(seen) == (3 if shared else 9)


def test_adamix_starts_with_experts_that_are_alike_and_stores_their_mean(tmp_path: Path) -> None:
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch()
    delta = api.attach(model, "adamix(experts=3, bottleneck=2)")
    for name, leaf in delta.tensors().items():
        assert name.rpartition("/")[2] != "D" or (leaf.std() > 0 and torch.equal(leaf[0], leaf[2]))
    move(delta)
    live = FAMILIES["bert"].logits(model, batch)
    folder = api.save(delta, tmp_path / "delta")
    delta.detach()
    loaded = api.load(folder, model)
    assert str(loaded.expression) == "adamix(bottleneck=2, experts=1)"
    plain = api.plan(model, "pfeiffer(bottleneck=2)")
    assert loaded.bank.numel == plain.trainable
    assert torch.equal(FAMILIES["bert"].logits(model, batch), live)


# ---- ProPETL


def largest(scores: Tensor, count: int) -> Tensor:
    order = scores.abs().flatten().argsort(descending=True)
    mask = torch.zeros(scores.numel(), dtype=scores.dtype)
    mask[order[:count]] = 1.0
    return mask.view_as(scores)


SCORED = {"D": (2, OUTPUTS), "U": (OUTPUTS, 2), "c": (2,), "e": (OUTPUTS,)}
SCORED |= {"mask_D": (2, OUTPUTS), "mask_U": (OUTPUTS, 2)}


def test_propetl_sees_a_prototype_through_the_largest_scores() -> None:
    p = drawn(8, **SCORED)
    W, b = base()
    y = X @ W.mT + b
    maps = {name: p[name] * largest(p[f"mask_{name}"], round(0.3 * 48)) for name in "DU"}
    found = output("propetl(bottleneck=2, kept=0.3, activation='relu')", p, X)
    close(found, y + bottleneck(y, **maps, c=p["c"], e=p["e"]))
    whole = output("propetl(bottleneck=2, kept=1.0, activation='relu')", p, X)
    close(whole, output("pfeiffer(bottleneck=2)", p, X))


def test_propetl_s_scores_get_the_gradient_of_the_mask() -> None:
    p = {name: leaf.requires_grad_() for name, leaf in drawn(9, **SCORED).items()}
    method = ProPETL(bottleneck=2, activation="relu")
    y = drawn(10, y=(5, OUTPUTS))["y"]
    method.output(y, y, p).square().sum().backward()
    masks = {name: largest(p[f"mask_{name}"].detach(), 24).requires_grad_() for name in "DU"}
    maps = {name: p[name].detach() * masks[name] for name in "DU"}
    by_hand = y + bottleneck(y, **maps, c=p["c"].detach(), e=p["e"].detach())
    by_hand.square().sum().backward()
    for name, mask in masks.items():
        assert mask.grad is not None and p[f"mask_{name}"].grad is not None
        close(p[f"mask_{name}"].grad, mask.grad * p[f"mask_{name}"].detach().sign())


def test_propetl_shares_all_but_the_masks_and_stores_those_as_bits(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    delta = api.attach(model, "propetl(bottleneck=2)")
    sites = len(delta.links)
    d = delta.links[0].site.outputs
    shared = 4 * d + 2 + d
    assert delta.bank.numel == shared + sites * 4 * d
    move(delta)
    folder = api.save(delta, tmp_path / "delta")
    delta.detach()
    loaded = api.load(folder, model)
    bits = [leaf for leaf in loaded.tensors().values() if leaf.dtype == torch.uint8]
    assert loaded.bank.numel == shared and sum(map(torch.numel, bits)) == sites * 4 * d // 8


# ---- SparseAdapter


def test_a_snip_adapter_asks_for_scores_that_are_not_zero() -> None:
    for fields in ("up_std=0.0", "sparsity=1.0"):
        with pytest.raises(ConfigurationError, match=r"sparsity lies in \[0, 1\) and up_std"):
            parse(f"snip_adapter({fields})")


def test_a_sparse_adapter_is_an_adapter_with_zeros() -> None:
    method = "sparse_adapter(bottleneck=4, sparsity=0.75, activation='relu')"
    kept = 4 * OUTPUTS // 4
    p = drawn(11, D=(kept,), U=(kept,), c=(4,), e=(OUTPUTS,))
    random = torch.Generator().manual_seed(12)
    p |= {f"places_{name}": torch.randperm(4 * OUTPUTS, generator=random)[:kept] for name in "DU"}
    dense = {"c": p["c"], "e": p["e"]}
    for name, shape in (("D", (4, OUTPUTS)), ("U", (OUTPUTS, 4))):
        dense[name] = torch.zeros(shape, dtype=torch.float64)
        for place, value in zip(p[f"places_{name}"].tolist(), p[name], strict=True):
            dense[name][place // shape[1], place % shape[1]] = value
    W, b = base()
    y = X @ W.mT + b
    close(output(method, p, X), y + bottleneck(y, **dense))


def test_large_sparse_costs_as_many_weights_and_masks_stay() -> None:
    model = FAMILIES["bert"].build()
    small = api.plan(model, "adapter(bottleneck=4, bias=False)").trainable
    large = "sparse_adapter(bottleneck=16, sparsity=0.75, bias=False)"
    delta = api.attach(model, large, slots=2, seed=[1, 2])
    assert delta.bank.numel == small
    one, other = delta.tensors(0), delta.tensors(1)
    masks = [name for name in one if "places" in name]
    assert all(len(one[name].unique()) == len(one[name]) for name in masks)
    assert all(not torch.equal(one[name], other[name]) for name in masks)
    assert len({tuple(one[name].tolist()) for name in masks}) == len(masks)


# ---- AdapterDrop, robust


def test_robust_dropping_leaves_out_the_same_lower_blocks_everywhere() -> None:
    kin = FAMILIES["bert"]
    delta = api.attach(kin.build(), "adapter_drop_robust(bottleneck=2, dropped=1)")
    move(delta)
    blocks = {link.site.block for link in delta.links}
    assert blocks == {0, 1} and len(delta.links) == 4
    leaves = delta.tensors()
    upper = api.attach(kin.build(), "adapter_drop(bottleneck=2, dropped=1)")
    kept = {name.replace("adapter_drop/", "adapter_drop_robust/"): name for name in upper.tensors()}
    upper.bank.write(0, {ours: leaves[name] for name, ours in kept.items()})
    whole = api.attach(kin.build(), "adapter(bottleneck=2)")
    whole.bank.write(0, {n.replace("_drop_robust", ""): v for n, v in leaves.items()})
    with torch.no_grad():
        expected = [kin.logits(d.model, kin.batch()) for d in (whole, upper)]
        assert torch.equal(kin.logits(delta.model, kin.batch()), expected[0])
        delta.train()
        seen = []
        for delta.step in range(12):
            found = kin.logits(delta.model, kin.batch())
            seen.append(next(n for n in (0, 1) if torch.equal(found, expected[n])))
    assert set(seen) == {0, 1}


def test_robust_dropping_draws_evenly_and_trains_no_adapter_that_is_out() -> None:
    method = AdapterDropRobust(bottleneck=2, dropped=1)
    lower = api.attach(FAMILIES["bert"].build(), method).links[0].site
    assert lower.block == 0
    p = {
        name: leaf.requires_grad_() for name, leaf in drawn(13, **SCORED).items() if name in "DUce"
    }
    y = drawn(14, y=(5, OUTPUTS))["y"]
    out = 0
    for step in range(400):
        gave = method.output(y, y, method.sample(lower, p, Draws(3, step)))
        if torch.equal(gave, y):
            out += 1
            assert all(not g.any() for g in torch.autograd.grad(gave.sum(), [*p.values()]))
    assert abs(out / 400 - 0.5) < 0.1


def test_robust_dropping_keeps_one_block_at_least() -> None:
    with pytest.raises(TargetError, match="of 2 blocks at most 1"):
        api.plan(FAMILIES["bert"].build(), "adapter_drop_robust(dropped=2)")


# ---- AdapterFusion


def fusion_leaves(experts: int) -> Leaves:
    d, m = OUTPUTS, 2
    adapters = {"D": (m, d), "c": (m,), "U": (d, m), "e": (d,)}
    stacked = {name: (experts, *shape) for name, shape in adapters.items()}
    return drawn(15, **stacked, Q=(d, d), q=(d,), K=(d, d), V=(d, d))


def test_fusion_attends_over_its_adapters_for_every_token() -> None:
    p = fusion_leaves(3)
    p |= {name: 0.1 * p[name] for name in "QqK"}
    W, b = base()
    found = output("adapter_fusion(bottleneck=2, experts=3)", p, X)
    for row, x in zip(found.flatten(0, 1), X.flatten(0, 1), strict=True):
        y = W @ x + b
        z = [bottleneck(y, *(p[name][n] for name in "DcUe")) for n in range(3)]
        scores = [float((p["Q"] @ y + p["q"]) @ (p["K"] @ one)) for one in z]
        total = sum(math.exp(one - max(scores)) for one in scores)
        a = [math.exp(one - max(scores)) / total for one in scores]
        mixed = a[0] * z[0] + a[1] * z[1] + a[2] * z[2]
        torch.testing.assert_close(row, y + p["V"] @ mixed, rtol=1e-4, atol=1e-4)


def test_a_fusion_of_one_adapter_is_that_adapter() -> None:
    p = fusion_leaves(1)
    found = output("adapter_fusion(bottleneck=2, experts=1)", p | {"V": torch.eye(OUTPUTS)}, X)
    close(found, output("pfeiffer(bottleneck=2)", mean({n: p[n] for n in "DcUe"}), X))


def test_fusion_pulls_its_values_to_the_identity() -> None:
    p = [fusion_leaves(2), fusion_leaves(2)]
    expected = sum(0.5 * (one["V"] - torch.eye(OUTPUTS)).pow(2).sum() for one in p)
    found = AdapterFusion(regularisation=0.5).penalty(p)
    assert found is not None
    close(found, torch.as_tensor(expected))


def test_fusion_trains_no_adapter() -> None:
    delta = api.attach(FAMILIES["bert"].build(), "adapter_fusion(bottleneck=2, experts=2)")
    d = delta.links[0].site.outputs
    assert delta.bank.numel == len(delta.links) * (3 * d * d + d)
    site = delta.links[0].site.name
    assert torch.equal(delta.tensors()[f"adapter_fusion/{site}/V"], torch.eye(d))
