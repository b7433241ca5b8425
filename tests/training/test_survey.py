"""What methods see of the training data before the first step, and what they begin with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.standin import quick
from tests.training.test_kernel import collate, rows_for
from torch import Tensor, nn

from deltatune import api
from deltatune.backbones.load import load_backbone
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, TargetError, TrainingError
from deltatune.core.run import Run, SlotRun
from deltatune.core.storage import storage_of
from deltatune.core.survey import Survey
from deltatune.testing.case import marks, same_state
from deltatune.testing.families import FAMILIES
from deltatune.training import Job, Settings, Steps, TrunkCache, fit, fit_many, survey
from deltatune.training.sampler import Sampler

FAMILY = ["t5", "bert", "gpt2"]
LINEAR = "attention | ffn.up | ffn.down"
METHODS = [
    f"eva(rank=2, rows=5, at='{LINEAR}')",
    f"lora_ga(rank=2, rows=5, at='{LINEAR}')",
    f"corda(rank=2, rows=5, at='{LINEAR}')",
    "fish(share=0.1, rows=5)",
    "snip_adapter(bottleneck=6, sparsity=0.75, rows=5)",
]


def settings(**values: Any) -> Settings:
    return quick(**{"base_dropout": False, "schedule": "constant", "max_norm": None, **values})


def a_delta(family: str, method: str, **values: Any) -> Delta:
    return api.attach(FAMILIES[family].build(), method, seed=1, **values)


def first_rows(family: str, count: int = 5) -> list[dict[str, list[int]]]:
    rows = rows_for(family)
    return [rows[place] for place in Sampler(len(rows), 4, 0).first(count)]


def looked(delta: Delta, rows: Sequence[Any]) -> Survey:
    """What was seen of all rows, after it was settled."""

    class Held(Run):
        def surveys(self) -> list[Survey]:
            return found

    found = Run(delta).surveys()
    survey(Held(delta), rows, collate)
    return found[0]


def by_site(delta: Delta, name: str) -> dict[str, dict[str, Tensor]]:
    """The leaves of the sites of one part."""
    held = delta.tensors()
    return {
        link.site.name: {leaf: held[full].clone() for leaf, full in link.names.items()}
        for link in delta.links
        if link.part == name
    }


@contextmanager
def reading(model: nn.Module, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """What every module with a weight reads, by path, from hooks of torch."""

    def keep(module: nn.Module, args: Any, path: str) -> None:
        if args and args[0].is_floating_point():
            seen.setdefault(path, []).append(args[0].detach().flatten(0, -2))

    hooks = [
        module.register_forward_pre_hook(functools.partial(keep, path=path))
        for path, module in model.named_modules()
        if "weight" in module._parameters
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of(family: str, rows: Sequence[Any]) -> dict[str, Any]:
    """Path to all tokens that a module reads of a plain model, float64."""
    model, seen = FAMILIES[family].build().eval(), dict[str, list[Tensor]]()
    with torch.no_grad(), reading(model, seen):
        for row in rows:
            model(**collate([row]))
    return {path: torch.cat(held).double().numpy() for path, held in seen.items()}


def gradients_of(family: str, rows: Sequence[Any]) -> dict[str, Tensor]:
    """The gradient of the mean loss with respect to every parameter of a trainable base."""
    model = FAMILIES[family].build().eval().requires_grad_(True)
    model(**collate(rows)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILY)
def test_gradients_are_those_of_a_base_that_is_trained(family: str) -> None:
    delta, rows = a_delta(family, METHODS[1]), first_rows(family)
    found = looked(delta, rows)
    expected = gradients_of(family, rows)
    for link in delta.links:
        whole = storage_of(link.site.module).view(expected[f"{link.site.path}.weight"])
        part = whole if link.site.rows is None else whole[slice(*link.site.rows)]
        torch.testing.assert_close(found._found(link)["gradients"], part, rtol=1e-3, atol=1e-6)
    if family == "gpt2":
        assert any(link.site.rows is not None for link in delta.links)


@pytest.mark.parametrize("quantise", ["nf4", "int8"])
def test_gradients_of_a_quantised_weight_are_those_of_its_plain_numbers(quantise: str) -> None:
    """A difference that is added to the plain numbers has the same gradient."""
    at, ids = "attention.q | ffn.down", [5, 9, 17, 4, 1]
    rows = [{"input_ids": ids[k:], "labels": ids[: k + 2]} for k in range(3)]
    model = load_backbone("t5-nano", quantise=quantise).model
    found = looked(api.attach(model, f"lora_ga(rank=2, rows=3, at='{at}')"), rows)
    found.delta.detach()
    other = api.attach(model, f"difference(at='{at}')")
    items = sum(len(row["labels"]) for row in rows)
    for row in rows:
        (model(**collate([row])).loss * len(row["labels"]) / items).backward()
    expected = {
        link.site.name: other.bank.gradients(0)[link.names["weight"]] for link in other.links
    }
    assert expected
    for link in found._links:
        seen = found._found(link)["gradients"]
        torch.testing.assert_close(seen, expected[link.site.name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY)
def test_squares_are_those_of_single_rows(family: str) -> None:
    delta, rows = a_delta(family, METHODS[3]), first_rows(family)
    (found,) = Run(delta).surveys()
    for row in rows:
        found.look(functools.partial(delta.model, **collate([row])), 1)
    each = [gradients_of(family, [row]) for row in rows]
    for link in delta.links:
        for name, value in found._found(link).items():
            path = f"{link.site.path}.{name}"
            expected = torch.stack([one[path].square() for one in each]).sum(0)
            torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("family", FAMILY)
def test_eva_spans_the_leading_singular_space_of_the_inputs(family: str) -> None:
    rows = rows_for(family)
    delta = a_delta(family, METHODS[0])
    fit(Run(delta), rows, collate, settings=settings(learning_rate=1e-12), budget=Steps(1))
    expected, held = inputs_of(family, first_rows(family)), by_site(delta, "eva")
    assert delta.links
    for link in delta.links:
        _, _, V = np.linalg.svd(expected[link.site.path], full_matrices=False)
        A = held[link.site.name]["A"].double().numpy()
        np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-5)
        np.testing.assert_allclose(A.T @ A, V[:2].T @ V[:2], atol=1e-3)
        assert float(held[link.site.name]["B"].abs().max()) < 1e-9


@pytest.mark.parametrize("family", FAMILY)
def test_the_first_step_of_lora_ga_is_the_nearest_of_its_rank(family: str) -> None:
    """(B A)' = B' A + B A' is, up to a factor, the best approximation of the gradient."""
    rows = first_rows(family)
    delta = a_delta(family, METHODS[1])
    looked(delta, rows)
    gradients = gradients_of(family, rows)
    delta.model(**collate(rows)).loss.backward()
    moved = delta.bank.gradients(0)
    for link in delta.links:
        whole = storage_of(link.site.module).view(gradients[f"{link.site.path}.weight"])
        G = (whole if link.site.rows is None else whole[slice(*link.site.rows)]).double().numpy()
        p = {name: delta.tensors()[full].double().numpy() for name, full in link.names.items()}
        g = {n: moved[f].double().numpy() for n, f in link.names.items() if f in moved}
        step = g["B"] @ p["A"] + p["B"] @ g["A"]
        U, S, V = np.linalg.svd(G, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ V[:4]
        factor = 8.0 * len(G) ** 0.5 / 16.0  # alpha / rank, and the square of the size
        np.testing.assert_allclose(step / factor, best, atol=2e-3 * S[0])


@pytest.mark.parametrize("smallest", [False, True])
def test_corda_begins_in_the_triplets_of_weight_times_covariance(smallest: bool) -> None:
    method = f"corda(rank=2, rows=5, smallest={smallest}, at='{LINEAR}')"
    delta, rows = a_delta("gpt2", method), first_rows("gpt2")
    looked(delta, rows)
    inputs, held = inputs_of("gpt2", rows), by_site(delta, "corda")
    kept = slice(-2, None) if smallest else slice(2)
    for link in delta.links:
        X = inputs[link.site.path]
        C = X.T @ X / len(X)
        C += 0.01 * C.diagonal().mean() * np.eye(len(C))
        U, S, V = np.linalg.svd(link.site.weight().double().numpy() @ C, full_matrices=False)
        expected = (U[:, kept] * S[kept]) @ V[kept] @ np.linalg.inv(C)
        p = held[link.site.name]
        product = 4.0 * (p["B0"] @ p["A0"]).double().numpy()
        np.testing.assert_allclose(product, expected, rtol=2e-3, atol=2e-4)
        assert torch.equal(p["A"], p["A0"])
        assert torch.equal(p["B"], p["B0"])


@pytest.mark.parametrize("method", METHODS[:3])
def test_nothing_is_left_behind_and_the_function_stays(method: str) -> None:
    delta, rows = a_delta("gpt2", method), rows_for("gpt2")
    model, batch = delta.model, FAMILIES["gpt2"].batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = marks(model)
    with torch.no_grad():
        logits = model(**batch).logits
    looked(delta, rows)
    same_state(model, state)
    assert marks(model) == before
    assert delta.bank.slots[0].grad is None
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, logits)


def test_fish_moves_the_entries_of_the_largest_information() -> None:
    delta, rows = a_delta("bert", METHODS[3]), rows_for("bert")
    fit(Run(delta), rows, collate, settings=settings(weight_decay=0.1), budget=Steps(4))
    each = [gradients_of("bert", [row]) for row in first_rows("bert")]
    worth, moved = [], []
    for link in delta.links:
        for name, full in link.names.items():
            path = f"{link.site.path}.{name}"
            worth.append(torch.stack([one[path].square() for one in each]).mean(0).flatten())
            moved.append(delta.tensors()[full].flatten() != 0)
    there, chosen = torch.cat(worth), torch.cat(moved)
    count = round(0.1 * len(there))
    assert 0.99 * count <= int(chosen.sum()) <= count
    # Only values at the very threshold may fall to either side.
    assert float(there[chosen].min()) >= 0.99 * float(there[~chosen].max())


def test_snip_keeps_the_entries_that_matter_most() -> None:
    """|w dL/dw| of an adapter of the same start, by plain autograd over a batch of all rows."""
    method, rows = "snip_adapter(bottleneck=6, sparsity=0.75, rows=5)", rows_for("bert")
    plain = a_delta("bert", "adapter(bottleneck=6, activation='gelu', up_std=0.02)")
    delta = a_delta("bert", method)
    drawn = {name: value.clone() for name, value in delta.tensors().items()}
    plain.bank.write(0, {n.replace("snip_adapter", "adapter"): v for n, v in drawn.items()})
    plain.model(**collate(first_rows("bert"))).loss.backward()
    found = plain.bank.gradients(0)
    names = [name for name in drawn if name.endswith(("/D", "/U"))]
    scores = [drawn[n] * found[n.replace("snip_adapter", "adapter")] for n in names]
    there = torch.cat([score.abs().flatten() for score in scores])
    fit(Run(delta), rows, collate, settings=settings(weight_decay=0.1), budget=Steps(4))
    held = delta.tensors()
    chosen = torch.cat([held[name].flatten() != 0 for name in names])
    assert int(chosen.sum()) == round(0.25 * len(there))
    assert float(there[chosen].min()) >= 0.99 * float(there[~chosen].max())
    moved = [held[name] != drawn[name] for name in names]
    assert all(one.any() for one in moved)  # and those that were kept were trained
    assert all(held[n].all() for n in held if n.endswith("/e"))


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_with_the_same_bits(method: str, tmp_path: Path) -> None:
    class Interrupted(Exception):
        """Ends a run from within."""

    class Interrupting(Run):
        at = 1

        def set_step(self, step: int) -> None:
            if step == self.at:
                raise Interrupted
            super().set_step(step)

    class Blind(Run):
        def surveys(self) -> list[Survey]:
            raise AssertionError("a run that goes on looked again")

    def trained(run: Run, folder: Path | None) -> dict[str, Tensor]:
        fit(run, rows, collate, settings=settings(), budget=Steps(6), folder=folder)
        return run.trainable_state()

    rows = rows_for("t5")
    expected = trained(Run(a_delta("t5", method)), None)
    for at, kind in ((1, Interrupting), (4, Interrupting)):
        run = kind(a_delta("t5", method))
        run.at = at
        with pytest.raises(Interrupted):
            trained(run, tmp_path / str(at))
        found = trained(Blind(a_delta("t5", method)), tmp_path / str(at))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("method", "cached"),
    [
        *((method, False) for method in METHODS),
        (f"{METHODS[1]} + adapter(bottleneck=2)", False),
        ("eva(rank=2, rows=5, at='block[1].linear')", True),
        ("lora_ga(rank=2, rows=5, at='block[1].linear')", True),
    ],
)
def test_together_is_as_alone(method: str, cached: bool) -> None:
    rows = {0: rows_for("bert", 12), 1: rows_for("bert", 20)[8:], 2: rows_for("bert", 20)}
    jobs = [
        Job(rows[k], settings(seed=k, checkpoint_every=None), Steps(3), seed=7 + k) for k in rows
    ]
    delta = a_delta("bert", method, slots=2)
    states: dict[int, dict[str, Tensor]] = {}

    def ended(number: int, slot: int, outcome: object) -> None:
        assert not isinstance(outcome, Exception), outcome
        states[number] = SlotRun(delta, slot).trainable_state()

    fit_many(delta, jobs, collate, ended=ended, trunk_cache=TrunkCache() if cached else None)
    for k, job in enumerate(jobs):
        alone = api.attach(FAMILIES["bert"].build(), method, seed=7 + k)
        fit(Run(alone), job.rows, collate, settings=job.settings, budget=job.budget)
        for name, value in alone.tensors().items():
            torch.testing.assert_close(states[k][name], value, rtol=1e-3, atol=1e-4)


def test_what_is_trained_or_frozen_keeps_its_values() -> None:
    delta = a_delta("bert", METHODS[0], slots=2)
    assert len(Run(delta).surveys()) == 2
    delta.freeze(1)
    assert [one.slot for one in Run(delta).surveys()] == [0]
    with torch.no_grad():
        delta.bank.slots[0][-1] += 1
    assert not Run(delta).surveys()
    assert not SlotRun(delta, 0).surveys()
    delta.redraw(0, 5)
    assert len(SlotRun(delta, 0).surveys()) == 1


def test_every_slot_begins_by_itself() -> None:
    delta, rows = a_delta("bert", METHODS[0], slots=2), rows_for("bert")
    before = delta.bank.slots[0].detach().clone()
    fit(SlotRun(delta, 1), rows, collate, settings=settings(), budget=Steps(1))
    assert torch.equal(delta.bank.slots[0], before)
    assert Run(delta).surveys()[0].slot == 0


def test_in_half_precision_the_start_is_near_that_of_fp32() -> None:
    """The projections onto what EVA begins with; sums are of fp32 in both."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        delta = api.attach(FAMILIES["bert"].build().to(dtype), METHODS[0], seed=1)
        looked(delta, first_rows("bert"))
        found.append(by_site(delta, "eva"))
    for name, leaves in found[0].items():
        ours, other = leaves["A"], found[1][name]["A"]
        assert other.dtype == torch.float32
        torch.testing.assert_close(ours.T @ ours, other.T @ other, rtol=0, atol=0.1)


def test_a_choice_that_no_policy_holds_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="fish keeps what it finds in the memory of"):
        looked(a_delta("bert", METHODS[3]), rows_for("bert"))


def test_rows_without_a_label_are_left_out() -> None:
    rows = rows_for("gpt2", 8)
    blank = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[:2]]
    method = f"lora_ga(rank=2, rows=10, at='{LINEAR}')"
    one, other = (looked(a_delta("gpt2", method), held) for held in (rows, [*blank, *rows]))
    assert torch.equal(one.delta.bank.slots[0], other.delta.bank.slots[0])
    with pytest.raises(TrainingError, match="no row with a label"):
        looked(a_delta("gpt2", METHODS[1]), blank)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    delta = a_delta("bert", METHODS[0])
    with torch.no_grad():
        next(delta.model.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError, match="eva looks at is not finite"):
        fit(Run(delta), rows_for("bert"), collate, settings=settings(), budget=Steps(1))


@pytest.mark.parametrize("name", ["eva", "lora_ga", "corda"])
def test_before_training_it_is_lora(name: str) -> None:
    delta = a_delta("bert", f"{name}(rank=2, alpha=4.0)")
    lora = a_delta("bert", "lora(rank=2, alpha=4.0)")
    with torch.no_grad():
        for one in (delta, lora):
            for full, value in one.tensors().items():
                leaf = full.rpartition("/")[2]
                if leaf in "AB":
                    value.copy_(torch.linspace(-1, 1, value.numel()).view(value.shape))
        batch = FAMILIES["bert"].batch()
        torch.testing.assert_close(delta.model(**batch).logits, lora.model(**batch).logits)


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        ("eva(rows=0)", ConfigurationError, "rows are those it begins from, at least 1; found 0"),
        ("fish(share=0.0)", ConfigurationError, r"share lies in \(0, 1\]"),
        ("lora_ga(gamma=0.0)", ConfigurationError, "gamma must be above 0"),
        ("lora_ga(rank=17)", TargetError, "no 34 singular vectors. Choose a rank of 1 to 16"),
    ],
)
def test_what_cannot_be_meant_is_refused(method: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        a_delta("bert", method)
