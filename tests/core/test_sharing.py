"""Slots that share leaves: the function and gradients of deltas that hold copies of them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tests.methods.test_conformance import CATALOGUE
from torch import Tensor

from deltatune import api
from deltatune.core.artefact import stored_tensors
from deltatune.core.bank import Bank
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.grammar import parse
from deltatune.core.layout import Sharing, leaves_of
from deltatune.core.leaf import draw
from deltatune.core.run import Run
from deltatune.core.start import start_from
from deltatune.core.status import status
from deltatune.core.swap import swap
from deltatune.testing.case import Case, close, close_gradients, move
from deltatune.training import Job, Settings, Steps, fit_many

# method, the leaves that its slots share and those of each
METHODS = {
    "mpt(length=3)": ({"P"}, {"u", "v"}),
    "intrinsic_prompt(length=3, dimension=5, middle=8, decoder=True)": (
        {"W1", "b1", "W2", "b2"},
        {"z"},
    ),
    "poly(rank=2, experts=3)": ({"A", "B"}, {"Z"}),
    "moelora(rank=4, experts=2, embedding=5)": ({"A", "B", "G"}, {"e"}),
    "hyperformer(bottleneck=4, embedding=4, middle=6, code=5)": (
        {"block", "sublayer", "W1", "b1", "W2", "b2", "norm", "offset", "W", "b", "V", "v"},
        {"task"},
    ),
    "mpt(length=3, frozen=True)": ({"P"}, {"u", "v"}),
    "poly(rank=2, experts=3) + lora(rank=2)": ({"A", "B"}, {"A", "B", "Z"}),
}
ROWS = ([0, 0, 1, 1, 2, 2], [2, 0, None, 2, 1, 2], [1] * 6)


def bank_of(delta: Delta) -> Bank:
    assert isinstance(delta.bank, Bank)
    return delta.bank


def equals_copies(case: Case, sharing: Sharing, rows: list[int | None]) -> None:
    """The law: K slots that share leaves give what K deltas with copies of them give; their own
    gradients are theirs, and that of what they share is the sum.
    """
    model, batch = case.model(), case.kin.batch(rows=6)
    bank = api.attach(model, case.expression, slots=3, sharing=sharing)
    move(bank)
    with bank.route(rows):
        mixed = case.kin.logits(model, batch)
    torch.autograd.backward(mixed.square().sum())
    held = bank_of(bank)
    total = {name: torch.zeros(shape) for name, shape in held.common.shapes.items()}
    for slot in sorted({slot for slot in rows if slot is not None}):
        alone = case.model()
        single = api.attach(alone, case.expression)
        single.bank.write(0, held.read(slot))
        mine = [place for place, used in enumerate(rows) if used == slot]
        logits = case.kin.logits(alone, batch)
        close(mixed[mine], logits[mine])
        torch.autograd.backward(logits[mine].square().sum())
        expected, found = single.bank.gradients(0), held.gradients(slot)
        for name in held.own.shapes:
            close_gradients(found[name], expected[name])
        for name in total:
            total[name] += expected[name]
    if held.shared is not None:
        joined = [torch.cat([one[name].flatten() for name in total]) for one in
                  (held.gradients(0), total)]  # fmt: skip
        close_gradients(*joined)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_slots_that_share_equal_copies(method: str, family: str, rows: list[int | None]) -> None:
    equals_copies(Case(method, family), "method", rows)


@pytest.mark.parametrize("method", CATALOGUE)
def test_one_delta_with_a_head_for_each_slot_equals_copies(method: str) -> None:
    case = Case(f"{method} + head(labels=2)", "bert")
    if case.lacks or case.in_place:
        return
    try:
        equals_copies(case, "all", [0, 2, 1, 0, None, 2])
    except UnsupportedError as error:
        parts = [m for m in case.expression if m.category != "head"]
        acting = [m for m in parts if m.has_policy() or m.has_penalty() or m.wanted is not None]
        shared = case.kin.shares and "one slot" in str(error)
        assert shared or (acting and "acts on the leaves of one slot" in str(error))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shared_is_what_the_method_says(method: str) -> None:
    case = Case(method, "t5")
    bank = bank_of(api.attach(case.model(), method, slots=3, sharing="method"))
    shared, own = METHODS[method]
    assert {name.rpartition("/")[2] for name in bank.sharing} == shared
    assert {name.rpartition("/")[2] for name in bank.own.shapes} == own
    single = bank_of(api.attach(case.model(), method))
    assert bank.numel == single.numel == api.plan(case.model(), method).trainable
    assert bank.total == bank.common.numel + 3 * bank.own.numel
    assert sum(parameter.numel() for parameter in bank.parameters()) == bank.total
    if "frozen" not in method:
        assert api.plan(case.model(), method).shared == bank.common.numel
        for name, rows in ((n, getattr(bank, at)) for n, at in bank.fixed.items()):
            assert len(rows) == 1, name


def test_what_is_shared_is_drawn_once_and_stays_when_a_slot_is_redrawn() -> None:
    case = Case("moelora(rank=4, experts=2, embedding=5)", "llama")
    delta = api.attach(case.model(), case.expression, slots=2, seed=[3, 8], sharing="method")
    leaves = leaves_of(delta.parts)

    def drawn(slot: int, seed: int, shared_seed: int) -> None:
        for name, value in delta.tensors(slot).items():
            used = shared_seed if name in bank_of(delta).sharing else seed
            assert torch.equal(value, draw(leaves[name], used, name))

    drawn(0, 3, 3)
    drawn(1, 8, 3)
    delta.redraw(1, 11)
    drawn(1, 11, 3)
    delta.redraw(0, 5)
    drawn(0, 5, 3)


def test_an_artefact_holds_what_is_shared_in_full(tmp_path: Path) -> None:
    case = Case("poly(rank=2, experts=3)", "llama")
    model = case.model()
    delta = api.attach(model, case.expression, slots=2, sharing="method")
    move(delta)
    with delta.route([1] * 4):
        expected = case.logits(model)
    folder = api.save(delta, tmp_path / "one", slot=1)
    assert not status(model).deltas[0].slots[1].changed
    assert bank_of(delta).shared is not None
    with torch.no_grad():
        delta.bank.shared.add_(1.0)  # type: ignore[union-attr, operator]
    assert status(model).deltas[0].slots[1].changed
    other = case.model()
    loaded = api.load(folder, other)
    assert loaded.slots == 1 and torch.equal(case.logits(other), expected)
    with pytest.raises(StateError, match="share leaves, which another delta's would replace"):
        swap(delta, folder)


def test_a_bank_that_shares_is_moved_copied_and_pickled() -> None:
    case = Case("mpt(length=3, frozen=True) + lora(rank=2)", "t5")
    bank = bank_of(api.attach(case.model(), case.expression, slots=3, sharing="method"))
    before = [{name: v.clone() for name, v in bank.read(slot).items()} for slot in range(3)]
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), bank.to("cpu")):
        assert other.own.shapes == bank.own.shapes and other.sharing == bank.sharing
        for slot, values in enumerate(before):
            held = other.read(slot)
            assert all(torch.equal(held[name], value) for name, value in values.items())
        name = next(iter(bank.sharing))
        other.write(1, {**other.read(1), name: torch.full_like(other.read(1)[name], 7.0)})
        assert all((other.read(slot)[name] == 7.0).all() for slot in range(3))
        for slot in range(3):
            other.write(slot, before[slot])


@pytest.mark.parametrize("grad", [True, False])
def test_a_change_of_what_is_shared_is_seen_within_a_route(grad: bool) -> None:
    case = Case("mpt(length=3)", "t5")
    model = case.model()
    delta = api.attach(model, case.expression, slots=2, sharing="method")
    with delta.route([1, 0, 1, 0]), torch.set_grad_enabled(grad):
        first = case.kin.logits(model, case.kin.batch())
        with torch.no_grad():
            delta.bank.shared.mul_(2.0)  # type: ignore[union-attr, operator]
        assert not torch.equal(case.kin.logits(model, case.kin.batch()), first)


def test_one_optimiser_trains_slots_and_what_they_share() -> None:
    case = Case("poly(rank=2, experts=3)", "llama")
    model = case.model()
    delta = api.attach(model, case.expression, slots=3, sharing="method")
    move(delta)
    run = Run(delta)
    groups = run.parameter_groups(0.1, 0.0)
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1]
    optimiser = torch.optim.AdamW(groups)
    before = [{n: v.clone() for n, v in delta.tensors(slot).items()} for slot in range(3)]
    with delta.route([0, 0, 2, 2]):
        case.kin.logits(model, case.kin.batch()).square().sum().backward()
    optimiser.step()
    for slot in range(3):
        moved = {n for n, v in delta.tensors(slot).items() if not torch.equal(v, before[slot][n])}
        shared = bank_of(delta).sharing
        assert moved == (shared if slot == 1 else {*before[slot]})


def test_what_is_shared_may_be_frozen() -> None:
    case = Case("poly(rank=2, experts=3)", "llama")
    model = case.model()
    delta = api.attach(model, case.expression, slots=2, sharing="method")
    delta.freeze_shared()
    assert len(Run(delta).parameter_groups(0.1, 0.0)) == 2
    with delta.route([0, 1, 0, 1]):
        case.kin.logits(model, case.kin.batch()).square().sum().backward()
    assert bank_of(delta).shared.grad is None  # type: ignore[union-attr]
    assert all(row.grad is not None for row in delta.bank.slots)
    delta.freeze_shared(frozen=False)
    assert len(Run(delta).parameter_groups(0.1, 0.0)) == 3
    delta.freeze()
    assert Run(delta).parameter_groups(0.1, 0.0) == []
    other = api.attach(case.model(), "lora", slots=2)
    with pytest.raises(StateError, match="share nothing"):
        other.freeze_shared()


@pytest.mark.parametrize(
    ("method", "sharing", "error", "said"),
    [
        ("lora", "method", ConfigurationError, "name no leaf that slots share"),
        ("lora", "all", ConfigurationError, "leave no leaf to a slot of its own"),
        ("mpt", "some", UnknownNameError, "sharing"),
        ("full", "method", ConfigurationError, "name no leaf"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    method: str, sharing: Sharing, error: type[Exception], said: str
) -> None:
    model = Case(method, "t5").model()
    state = model.state_dict()
    with pytest.raises(error, match=said):
        api.attach(model, method, sharing=sharing)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_method_that_acts_on_its_slot_shares_nothing() -> None:
    with pytest.raises(UnsupportedError, match="adalora acts on the leaves of one slot"):
        api.attach(Case("adalora", "bert").model(), "adalora + head", slots=2, sharing="all")


def test_runs_that_share_leaves_are_one_run() -> None:
    delta = api.attach(Case("mpt", "t5").model(), "mpt", slots=2, sharing="method")
    jobs = [Job([1], Settings(learning_rate=0.1), Steps(1))] * 2
    with pytest.raises(ConfigurationError, match="their runs are one"):
        fit_many(delta, jobs, lambda rows: {})


def values(delta: Delta, slot: int = 0) -> dict[str, Tensor]:
    return {n.rpartition("/")[2]: v.clone() for n, v in delta.tensors(slot).items()}


@pytest.mark.parametrize("from_folder", [True, False])
def test_a_second_stage_starts_from_what_was_shared(from_folder: bool, tmp_path: Path) -> None:
    """The decoder of the first stage, frozen, and a vector of its own."""
    fields = "length=3, dimension=5, middle=8"
    case = Case(f"intrinsic_prompt({fields}, decoder=True)", "t5")
    first = api.attach(case.model(), case.expression, slots=2, sharing="method")
    move(first)
    learned = values(first, 1)
    source: Delta | Path = first
    if from_folder:
        source = api.save(first, tmp_path / "first", slot=1, as_trained=True)
        loaded = api.load(source, case.model())
        assert str(loaded.expression) == case.method
        assert all(torch.equal(v, learned[n]) for n, v in values(loaded).items())
    second = api.attach(case.model(), f"intrinsic_prompt({fields})", seed=9)
    drawn = values(second)
    start_from(second, source, source_slot=0, only_shared=True)
    found = values(second)
    assert torch.equal(found["z"], drawn["z"])
    assert all(torch.equal(found[name], learned[name]) for name in ("W1", "b1", "W2", "b2"))
    assert bank_of(second).trained == {"intrinsic_prompt/encoder/z": (5,)}
    assert second.bank.numel == 5
    start_from(second, source, source_slot=0 if from_folder else 1)
    assert torch.equal(values(second)["z"], learned["z"])


def test_a_frozen_mpt_starts_from_one_that_was_trained() -> None:
    case = Case("mpt(length=3)", "t5")
    source = api.attach(case.model(), case.expression)
    move(source)
    target = api.attach(case.model(), "mpt(length=3, frozen=True)", seed=4)
    start_from(target, source)
    assert all(torch.equal(v, values(source)[n]) for n, v in values(target).items())


def test_plain_banks_store_what_they_stored() -> None:
    case = Case("mpt(length=3)", "t5")
    delta = api.attach(case.model(), parse(case.method))
    assert {n.rpartition("/")[2] for n in stored_tensors(delta)} == {"P"}
    assert {n.rpartition("/")[2] for n in stored_tensors(delta, as_trained=True)} == {"P", "u", "v"}
