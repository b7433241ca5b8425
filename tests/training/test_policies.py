"""What methods do in training beside following the gradient, by `fit` on the real kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tests.training.standin import quick
from tests.training.test_kernel import a_run, collate, rows_for, trained
from torch import Tensor, nn

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.core.grammar import parse
from deltatune.core.method import Leaves
from deltatune.core.policy import Draws, Policies, penalty
from deltatune.core.run import Run
from deltatune.methods import DyLoRA, LoRA
from deltatune.testing.families import FAMILIES
from deltatune.training import Job, Steps, fit, fit_many


@dataclass(frozen=True, kw_only=True)
class Faster(LoRA):
    """LoRA whose B trains faster; not registered."""

    def rate(self, leaf: str) -> float:
        return 16.0 if leaf == "B" else 1.0


@dataclass(frozen=True, kw_only=True)
class Smaller(LoRA):
    """LoRA that pays for the size of B."""

    def penalty(self, sites: Sequence[Leaves]) -> Tensor | None:
        return torch.stack([(p["B"] - 1).square().sum() for p in sites]).sum()


def by_hand(
    method: str,
    groups: Callable[[Mapping[str, nn.Parameter]], list[dict[str, Any]]],
    extra: Callable[[Mapping[str, nn.Parameter]], Tensor] | None = None,
    steps: int = 6,
) -> dict[str, Tensor]:
    """The leaves after a bare loop over leaves that are parameters of their own."""
    model, batch = FAMILIES["bert"].build(), collate(rows_for("bert", 8))
    delta = api.attach(model, method, seed=1)
    leaves = {name: nn.Parameter(value.clone()) for name, value in delta.tensors().items()}
    optimiser = torch.optim.AdamW(groups(leaves), lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        delta.bank.write(0, leaves)
        model(**batch).loss.backward()
        found = delta.bank.gradients(0)
        for name, leaf in leaves.items():
            leaf.grad = found[name].clone()
        if extra is not None:
            extra(leaves).backward()
        optimiser.step()
        optimiser.zero_grad()
        delta.bank.slots[0].grad = None
    return {name: leaf.detach() for name, leaf in leaves.items()}


def by_fit(method: LoRA, steps: int = 6) -> Delta:
    delta = api.attach(FAMILIES["bert"].build(), method, seed=1)
    settings = quick(per_device_batch_size=8, max_norm=None, schedule="constant", weight_decay=0.1)
    fit(Run(delta), rows_for("bert", 8), collate, settings=settings, budget=Steps(steps))
    return delta


def test_a_leaf_trains_at_a_rate_of_its_own() -> None:
    def groups(leaves: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": [leaf for name, leaf in leaves.items() if name.endswith(which)], "lr": rate}
            for which, rate in (("/A", 0.02), ("/B", 0.32))
        ]

    ours = by_fit(Faster(rank=2)).tensors()
    for name, expected in by_hand("lora(rank=2)", groups).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5)


def test_a_penalty_is_added_once_to_the_loss_of_a_step() -> None:
    def extra(leaves: Mapping[str, nn.Parameter]) -> Tensor:
        return torch.stack(
            [(leaf - 1).square().sum() for name, leaf in leaves.items() if name.endswith("/B")]
        ).sum()

    expected = by_hand("lora(rank=2)", lambda leaves: [{"params": [*leaves.values()]}], extra)
    ours = by_fit(Smaller(rank=2)).tensors()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        "adalora(rank=3, final_rank=1, every=2)",
        "dylora(rank=3)",
        "adamix(bottleneck=4)",
        "adapter_drop_robust(bottleneck=4, dropped=1)",
        "poly(rank=2)",
        "lt_sft(share=0.1)",
        "diff_pruning(share=0.1, turn=0.5)",
    ],
)
def test_runs_that_share_a_base_have_policies_of_their_own(method: str) -> None:
    """Two runs at once end as each alone."""
    rows, settings = rows_for("bert"), quick(schedule="constant", base_dropout=False)
    many = api.attach(FAMILIES["bert"].build(), method, slots=2, seed=[1, 5])
    lengths = (9, 12)
    jobs = [Job(rows, settings, Steps(length)) for length in lengths]
    fit_many(many, jobs, collate)
    for slot, (seed, length) in enumerate(zip((1, 5), lengths, strict=True)):
        alone = api.attach(FAMILIES["bert"].build(), method, seed=seed)
        fit(Run(alone), rows, collate, settings=settings, budget=Steps(length))
        for name, value in alone.tensors().items():
            torch.testing.assert_close(many.tensors(slot)[name], value, rtol=1e-3, atol=1e-4)


# ---- DyLoRA


def test_dylora_draws_one_rank_for_all_sites_anew_in_every_step() -> None:
    method = DyLoRA(rank=4, lowest=2)
    site = api.attach(FAMILIES["bert"].build(), method).links[0].site
    p = {"A": torch.ones(4, site.inputs), "B": torch.ones(site.outputs, 4)}
    seen = []
    for step in range(60):
        A, _ = method.factors(method.sample(site, p, Draws(3, step)))
        b = int((A[:, 0] != 0).sum())
        assert torch.equal(A[:, 0], torch.tensor([16.0 / b] * b + [0.0] * (4 - b)))
        seen.append(b)
    assert set(seen) == {2, 3, 4}


def test_dylora_serves_at_every_rank_as_it_was_trained() -> None:
    batch = FAMILIES["bert"].batch()
    _, run = a_run("bert", "dylora(rank=3, lowest=2)")
    trained(run, "bert")
    leaves = run.delta.tensors()
    for b in (2, 3):
        used = api.attach(FAMILIES["bert"].build(), f"dylora(rank=3, used={b})")
        used.bank.write(0, leaves)
        plain = api.attach(FAMILIES["bert"].build(), f"lora(rank={b})")
        cut = {n: v[:b] if n.endswith("/A") else v[:, :b] for n, v in leaves.items()}
        plain.bank.write(0, {n.replace("dylora/", "lora/"): v for n, v in cut.items()})
        with torch.no_grad():
            found, expected = used.model(**batch).logits, plain.model(**batch).logits
        torch.testing.assert_close(found, expected)


def test_frozen_dylora_moves_the_last_rank_of_its_draw_alone() -> None:
    model, run = a_run("bert", "dylora(rank=3, frozen=True)")
    run.train()
    run.set_step(0)
    model(**collate(rows_for("bert", 4))).loss.backward()
    moved = {
        int(column)
        for name, gradient in run.delta.bank.gradients(0).items()
        if name.endswith("/B")
        for column in gradient.abs().sum(0).nonzero()
    }
    assert len(moved) == 1


# ---- AdaLoRA


class Two(nn.Module):
    """Two linear maps, as PEFT and we both adapt them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def test_adalora_keeps_what_peft_keeps() -> None:
    """The same values and gradients in every step: the same entries of E are cut, step by step."""
    total, settings = 40, {"tinit": 4, "tfinal": 10, "deltaT": 3}
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=total, target_modules=["first", "second"], **settings
    )
    theirs = peft.get_peft_model(Two(), config)
    allocator = theirs.base_model.rankallocator
    method = parse("adalora(rank=4, final_rank=2, begin=0.1, end=0.25, every=3, at='first|second')")
    delta = api.attach(Two(), method)
    policies, random = Policies(delta, [0]), torch.Generator().manual_seed(0)
    names = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    for step in range(total):
        values, gradients = {}, {}
        for link in delta.links:
            layer = getattr(theirs.base_model.model, link.site.path)
            for leaf, full in link.names.items():
                place = getattr(layer, names[leaf])["default"]
                shape = delta.tensors()[full].shape
                values[full] = torch.randn(shape, generator=random)
                gradients[full] = torch.randn(shape, generator=random)
                place.data.copy_(values[full].reshape(place.shape))
                place.grad = gradients[full].reshape(place.shape)
        delta.bank.write(0, values)
        flat = torch.cat([gradients[name].flatten() for name in delta.bank.trained])
        delta.bank.slots[0].grad = flat
        if step < total - settings["tfinal"]:  # PEFT has another call for its last phase
            allocator.update_and_allocate(theirs.base_model.model, step)
        policies.on_step(step, step / total)
        if step < total - settings["tfinal"]:
            for link in delta.links:
                layer = getattr(theirs.base_model.model, link.site.path)
                kept = layer.lora_E["default"].flatten() != 0
                ours = delta.tensors()[link.names["E"]] != 0
                assert torch.equal(ours, kept), (step, link.site.path)


def test_adalora_ends_with_its_budget() -> None:
    _, run = a_run("bert", "adalora(rank=3, final_rank=1, every=2)")
    trained(run, "bert", steps=20)
    kept = [v for name, v in run.delta.tensors().items() if name.endswith("/E")]
    assert sum(int((one != 0).sum()) for one in kept) == len(kept)


# ---- IncreLoRA


def test_increlora_grows_to_its_budget_one_rank_behind_the_other() -> None:
    _, run = a_run("bert", "increlora(rank=4, final_rank=2, every=2)")
    delta, ranks = run.delta, []

    def validate() -> Mapping[str, float]:
        held = [v for name, v in delta.tensors().items() if name.endswith("/E")]
        for value in held:  # those that are there, then one that waits, then none
            assert not value[int((value != 0).sum()) :].any()
        ranks.append(sum(int((value != 0).sum()) for value in held))
        return {"score": 0.0}

    settings = quick(schedule="constant", evaluation_every=1, keep_best=False)
    rows = rows_for("bert")
    fit(run, rows, collate, settings=settings, budget=Steps(30), validate=validate)
    sites = len(delta.links)
    assert ranks[2] == 2 * sites  # one, and one that waits
    assert ranks[:20] == sorted(ranks[:20]) and ranks[-1] == 2 * sites


def test_a_rank_that_comes_leaves_the_function_as_it_is() -> None:
    model, run = a_run("bert", "increlora(rank=3, final_rank=3, every=1, begin=0.0, end=0.1)")
    delta, batch = run.delta, FAMILIES["bert"].batch()
    policies, random = Policies(delta, [0]), torch.Generator().manual_seed(0)
    row = delta.bank.slots[0]
    for step in range(3):
        row.grad = torch.randn(row.shape, generator=random)
        with torch.no_grad():
            before = model(**batch).logits
        policies.on_step(step, 0.4 * step)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-4)


# ---- Delta-LoRA


def test_delta_lora_moves_the_weight_by_what_its_factors_move() -> None:
    """Against a loop that moves W itself."""
    total, begin, ratio, steps = 10, 0.3, 2.0, 10
    model = FAMILIES["bert"].build()
    delta = api.attach(model, "lora(rank=2)", seed=1)
    batch = collate(rows_for("bert", 8))
    optimiser = torch.optim.AdamW(delta.parameters(), lr=0.02, weight_decay=0.0)
    scale = 16.0 / 2
    losses = []
    for step in range(steps):
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        loss.backward()
        before = {link: products(delta, link) for link in delta.links}
        optimiser.step()
        optimiser.zero_grad()
        # The step in which the count begins is the first whose factors are the start of the way.
        if step / total >= begin and step > 3:
            for link in delta.links:
                link.site.module.weight.data += (
                    ratio * scale * (products(delta, link) - before[link])
                )
    ours = api.attach(
        FAMILIES["bert"].build(), f"delta_lora(rank=2, ratio={ratio}, begin={begin})", seed=1
    )
    for name, value in (
        api.attach(FAMILIES["bert"].build(), "lora(rank=2)", seed=1).tensors().items()
    ):
        ours.bank.read(0)[name.replace("lora/", "delta_lora/")].data.copy_(value)
    settings = quick(per_device_batch_size=8, max_norm=None, schedule="constant")
    result = fit(Run(ours), rows_for("bert", 8), collate, settings=settings, budget=Steps(steps))
    assert result.losses == pytest.approx(losses, abs=2e-4)


def products(delta: Delta, link: Any) -> Tensor:
    values = delta.tensors()
    return values[link.names["B"]] @ values[link.names["A"]]


# ---- masks that are found in training


@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("lt_sft(share=0.1, turn=0.5)", 0.1),
        ("child_tuning(share=0.2, turn=0.3)", 0.2),
        ("diff_pruning(share=0.05, turn=0.5)", 0.05),
    ],
)
def test_only_the_share_that_is_kept_moves(method: str, share: float) -> None:
    _, run = a_run("bert", method)
    trained(run, "bert")
    stored = torch.cat([v.flatten() for n, v in run.delta.tensors().items() if "gate" not in n])
    assert 0.9 * share < float((stored != 0).float().mean()) <= share + 1e-4


def test_sam_keeps_the_steepest_entries_of_every_tensor() -> None:
    """Those of the sum of the gradients at the start, found by hand; two that differ by the error
    of rounding alone may stand for each other.
    """
    _, run = a_run("bert", "sam(share=0.1, turn=0.45)")
    rows = rows_for("bert", 8)
    plain = api.attach(FAMILIES["bert"].build(), "sam(share=0.1)", seed=1)
    plain.model(**collate(rows)).loss.backward()
    steepest = plain.bank.gradients(0)
    settings = quick(per_device_batch_size=8, max_norm=None, schedule="constant")
    fit(Run(run.delta), rows, collate, settings=settings, budget=Steps(8))
    for name, value in run.delta.tensors().items():
        count = max(1, round(0.1 * value.numel()))
        size = steepest[name].abs().flatten()
        least = float(size.topk(count).values[-1])
        moved = value.flatten() != 0
        assert 0 < int(moved.sum()) <= count, name
        assert float(size[moved].min()) >= least * (1 - 1e-4) - 1e-7, name


def test_pruned_bitfit_keeps_whole_vectors_where_it_is_structured() -> None:
    _, run = a_run("bert", "pruned_bitfit(structured=True, share=0.4)")
    trained(run, "bert")
    held = [v for v in run.delta.tensors().values() if len(v) > 1]
    partly = [v for v in held if 0 < int((v != 0).sum()) < len(v)]
    assert len(partly) <= 1 and any(v.any() for v in held) and not all(v.any() for v in held)


GROUPS = {"D": 0, "c": 0, "U": 1, "K": 0, "V": 0}  # of one hidden unit, or token: an axis


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("method", ["pruned_parallel(bottleneck=6", "pruned_prefix(length=5"])
def test_what_matters_in_first_order_begins_again_where_it_began(
    method: str, structured: bool
) -> None:
    """Scores and groups found by hand, over steps that are made up."""
    _, run = a_run("bert", f"{method}, share=0.4, structured={structured})")
    delta, random = run.delta, np.random.default_rng(0)
    policies, start = Policies(delta, [0]), {n: v.clone() for n, v in delta.tensors().items()}
    score = {name: np.zeros(value.shape) for name, value in start.items()}
    row = delta.bank.slots[0]
    for step, done in enumerate((0.0, 0.1, 0.2, 0.3)):
        row.data += torch.from_numpy(random.normal(size=row.shape)).float()
        row.grad = torch.from_numpy(random.normal(size=row.shape)).float()
        found = delta.bank.gradients(0)
        for name, value in delta.tensors().items():
            score[name] += value.double().numpy() * found[name].double().numpy()
        assert policies.on_gradients(step, done) is (done == 0.3)
        policies.on_step(step, done)
    worth = {}
    for name, one in score.items():
        site, _, leaf = name.rpartition("/")
        if structured and leaf in GROUPS:
            kin = [(score[f"{site}/{n}"], a) for n, a in GROUPS.items() if f"{site}/{n}" in score]
            sums = sum(np.moveaxis(s, a, 0).reshape(s.shape[a], -1).sum(1) for s, a in kin)
            shape = [-1 if axis == GROUPS[leaf] else 1 for axis in range(one.ndim)]
            worth[name] = np.broadcast_to(np.abs(sums).reshape(shape), one.shape)
        elif structured:
            worth[name] = np.full(one.shape, abs(one.sum()))
        else:
            worth[name] = np.abs(one)
    ranked = np.sort(np.concatenate([one.ravel() for one in worth.values()]))[::-1]
    least = ranked[round(0.4 * len(ranked)) - 1]
    for name, value in delta.tensors().items():
        kept = torch.from_numpy(worth[name] >= least * (1 - 1e-5))
        assert torch.equal(value, torch.where(kept, start[name], 0.0)), name


def test_a_structured_adapter_is_a_smaller_one() -> None:
    _, run = a_run("bert", "pruned_parallel(bottleneck=6, share=0.5, structured=True)")
    trained(run, "bert")
    kin, delta = FAMILIES["bert"], run.delta
    held = {name.partition("/")[2]: value for name, value in delta.tensors().items()}
    units: dict[str, Tensor] = {}
    for name, value in held.items():
        site, _, leaf = name.rpartition("/")
        if leaf == "D":
            units[site] = value.any(1)
            assert torch.equal(units[site], held[f"{site}/U"].any(0))
            assert not held[f"{site}/c"][~units[site]].any()
    sizes = [int(one.sum()) for one in units.values()]
    assert 0 < sum(sizes) < 6 * len(sizes)
    with torch.no_grad():
        wanted = kin.logits(delta.model, kin.batch())
    # Every site with the units that are left, in a bottleneck as wide as the largest needs.
    small = api.attach(FAMILIES["bert"].build(), f"parallel(bottleneck={max(sizes)})")
    packed = {}
    for name, value in small.tensors().items():
        rest = name.partition("/")[2]
        site, _, leaf = rest.rpartition("/")
        packed[name] = value.zero_()
        if leaf == "e":
            packed[name].copy_(held[rest])
            continue
        axis = GROUPS[leaf]
        kept = held[rest].movedim(axis, 0)[units[site]]
        packed[name].movedim(axis, 0)[: len(kept)] = kept
    small.bank.write(0, packed)
    with torch.no_grad():
        torch.testing.assert_close(kin.logits(small.model, kin.batch()), wanted)


def test_free_child_tuning_keeps_the_gradient_in_the_mean() -> None:
    _, run = a_run("bert", "child_tuning_free(share=0.25)")
    delta = run.delta
    policies = Policies(delta, [0])
    total = torch.zeros_like(delta.bank.slots[0])
    for step in range(200):
        delta.bank.slots[0].grad = torch.ones_like(total)
        policies.on_gradients(step, 0.0)
        found = delta.bank.slots[0].grad
        assert set(found.unique().tolist()) == {0.0, 4.0}
        total += found / 200
    assert float((total - 1).abs().mean()) < 0.15 and float(total.mean()) == pytest.approx(
        1, abs=0.01
    )


def test_diff_pruning_counts_its_open_gates() -> None:
    """The expected number by the formula, and by drawing."""
    _, run = a_run("bert", "diff_pruning(sparsity=1.0)")
    delta = run.delta
    gates = {n: torch.randn_like(v) for n, v in delta.tensors().items() if n.endswith(".gate")}
    delta.bank.write(0, {**delta.tensors(), **gates})
    expected = float(torch.cat([torch.sigmoid(g).flatten() for g in gates.values()]).sum())
    found = penalty(delta, [0])
    assert found is not None and float(found.detach()) == pytest.approx(expected, rel=1e-5)
    link = delta.links[0]
    p = {leaf: delta.tensors()[full] for leaf, full in link.names.items()}
    method = link.method
    leaf = next(name for name in p if name.endswith(".gate"))
    drawn = [
        float(
            (3 * torch.sigmoid(method.sample(link.site, p, Draws(0, k))[leaf]) - 1.5 > 0)
            .float()
            .mean()
        )
        for k in range(60)
    ]
    assert sum(drawn) / 60 == pytest.approx(float(torch.sigmoid(p[leaf]).mean()), abs=0.01)


# ---- the mechanism


def test_memory_of_another_policy_is_refused() -> None:
    _, run = a_run("bert", "lt_sft")
    policies = run.policies()
    with pytest.raises(ArtefactError, match="another method's policy"):
        policies.restore({"0/lt_sft/other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("adalora(final_rank=13)", "final_rank lies in 1 to rank=12"),
        ("adalora(begin=0.6, end=0.4)", "leave something between them"),
        ("increlora(final_rank=17)", "final_rank lies in 1 to rank=16"),
        ("increlora(end=0.0)", "end above 0"),
        ("dylora(lowest=0)", "lowest lies in 1 to rank=8"),
        ("delta_lora(dropout=0.1)", "takes no dropout"),
        ("lt_sft(share=0.0)", r"share lies in \(0, 1\]"),
        ("child_tuning_free(share=2.0)", r"share lies in \(0, 1\]"),
        ("diff_pruning(turn=1.0)", r"turn in \(0, 1\)"),
    ],
)
def test_values_that_cannot_be_meant(method: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(method)


def test_the_members_that_a_mixer_keeps_have_no_policy_and_pay_no_penalty() -> None:
    text = "gate(adalora(rank=3, final_rank=1, every=2), lora(rank=2), frozen=True)"
    delta = api.attach(FAMILIES["bert"].build(), text)
    delta.bank.write(0, {name: value + 0.05 for name, value in delta.tensors().items()})
    before = {name: value.clone() for name, value in delta.tensors().items()}
    assert Policies(delta, [0]).acting == {}
    assert penalty(delta, [0]) is None
    settings = quick(schedule="constant", base_dropout=False)
    fit(Run(delta), rows_for("bert"), collate, settings=settings, budget=Steps(4))
    moved = {
        name for name, value in delta.tensors().items() if not torch.equal(before[name], value)
    }
    assert moved and {name.partition("/")[0] for name in moved} <= {"gate"}
