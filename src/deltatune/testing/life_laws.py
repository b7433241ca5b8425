"""Laws of a delta's life: planned, attached, merged, saved, copied, detached."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch
from transformers import AutoConfig

from deltatune import api
from deltatune.core.artefact import read, stored_tensors
from deltatune.core.delta import deltas_of
from deltatune.core.errors import BackboneMismatchError, StateError, UnsupportedError
from deltatune.testing.case import Case, cast, close, marks, move, same_state


def law_count(case: Case, folder: Path) -> None:
    """L2: plan, bank and artefact agree, with weights and on the meta device."""
    del folder
    model = case.model()
    planned = api.plan(model, case.expression)
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        ghost = type(model)(config)
    assert api.plan(ghost, case.expression) == planned
    delta = api.attach(model, case.expression)
    assert planned.trainable == delta.bank.numel
    assert planned.stored == sum(t.numel() for t in stored_tensors(delta).values())
    assert planned.base == sum(p.numel() for p in model.parameters())


def law_merge(case: Case, folder: Path) -> None:
    """L3, L4: merged equals live, unmerged is the base bit for bit; or merging is refused."""
    del folder
    with case.attached() as (model, delta):
        base = {name: value.clone() for name, value in model.state_dict().items()}
        live = case.logits(model)
        try:
            delta.merge()
        except UnsupportedError:
            same_state(model, base)
            return
        if not case.in_place:
            close(case.logits(model), live)
            try:
                with delta.active(False):
                    raise AssertionError("a merged delta was switched off, which it cannot be")
            except StateError:
                pass
        delta.unmerge()
        same_state(model, base)
        assert torch.equal(case.logits(model), live)


def law_checkpoint(case: Case, folder: Path) -> None:
    """L6: saved and loaded, the logits are the same bit for bit; another backbone refuses."""
    with case.attached() as (model, delta):
        live = case.logits(model)
        delta_folder = api.save(delta, folder / "delta")
        stored = stored_tensors(delta)
    assert set(read(delta_folder).tensors) == set(stored)
    fresh = case.model()
    api.load(delta_folder, fresh)
    assert torch.equal(case.logits(fresh), live)
    other = case.model()
    with torch.no_grad():
        next(other.parameters()).view(-1)[3] += 1e-3
    try:
        api.load(delta_folder, other)
    except BackboneMismatchError as error:
        assert "other weights" in str(error)
    else:
        raise AssertionError("a delta was loaded on another backbone")
    assert not deltas_of(other)


def law_composition(case: Case, folder: Path) -> None:
    """L7: beside another delta, counts add, and switching that one off leaves this one's logits."""
    del folder
    with case.attached() as (model, delta):
        alone = case.logits(model)
        try:
            second = api.attach(
                model, "lora(rank=2, at='attention.output') + bitfit(at='norm')", seed=5
            )
        except StateError:
            assert case.in_place
            return
        assert torch.equal(case.logits(model), alone)
        move(second, 5)
        both = case.logits(model)
        assert not torch.equal(both, alone)
        with second.active(False):
            assert torch.equal(case.logits(model), alone)
        delta.detach()
        second.detach()
        assert not deltas_of(model)


def law_detach(case: Case, folder: Path) -> None:
    """L8: after detaching the model is as it was: bytes, flags, hooks, instance names."""
    del folder
    model = case.kin.build()
    model.get_parameter(next(name for name, _ in model.named_parameters())).requires_grad_(False)
    base, before = {n: v.clone() for n, v in model.state_dict().items()}, marks(model)
    logits = case.logits(model)
    delta = api.attach(model, case.expression)
    move(delta)
    delta.detach()
    same_state(model, base)
    assert marks(model) == before
    assert torch.equal(case.logits(model), logits)


def law_draws(case: Case, folder: Path) -> None:
    """L9 and L12: leaves depend on the seed alone, not on the dtype of the base."""
    del folder
    wide, narrow = case.model(), case.model()
    cast(cast(wide, torch.bfloat16), torch.float32)
    cast(narrow, torch.bfloat16)
    one, two = (api.attach(model, case.expression, seed=3) for model in (wide, narrow))
    for name, value in one.tensors().items():
        assert torch.equal(value.float(), two.tensors()[name].float()), name


def law_copies(case: Case, folder: Path) -> None:
    """A deep copy and a pickle of the model carry a delta of their own, equal and independent."""
    del folder
    with case.attached() as (model, delta):
        live = case.logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            (theirs,) = deltas_of(other)
            assert torch.equal(case.logits(other), live)
            move(theirs, 9)
            assert not torch.equal(case.logits(other), live)
            assert torch.equal(case.logits(model), live)
            theirs.detach()
            assert not deltas_of(other) and deltas_of(model) == (delta,)
        assert torch.equal(case.logits(model), live)


def law_base_is_kept(case: Case, folder: Path) -> None:
    """`save_pretrained` of the base under a delta writes the whole base, by its own names."""
    with case.attached() as (model, _):
        if case.in_place:
            return
        clean = case.model()
        model.save_pretrained(folder / "base")
    again = type(clean).from_pretrained(folder / "base")
    same_state(again, dict(clean.state_dict()))
    config = AutoConfig.from_pretrained(folder / "base")
    assert "delta" not in str(config.to_dict().get("_attn_implementation", ""))
    assert torch.equal(case.logits(again), case.logits(clean))
