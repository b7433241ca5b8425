"""Pairs: what becomes of two methods on one model, in this order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from deltatune import api
from deltatune.core.errors import DeltatuneError, UnsupportedError
from deltatune.testing.case import Case, move, named_gradients

__all__ = ["MERGED", "SUMMED", "pair"]

MERGED, SUMMED = "merged", "summed"


def pair(first: str, second: str, family: str, *, seed: int = 0) -> str:
    """Attaches `first + second` and holds it to what every composition promises.

    Both act, both get a gradient, one artefact holds both, and where they can be written into the
    weights, that changes nothing and is undone to the bit.

    Args:
        first, second: expressions.
        family: a name in `deltatune.testing.families`.
        seed: of the values that are tried.

    Returns:
        MERGED; SUMMED where a part acts on activations or merging is refused; or the sentence with
        which the pair is refused.

    Raises:
        AssertionError: a promise is broken.
    """
    case = Case(f"{first} + {second}", family)
    model = case.model()
    try:
        delta = api.attach(model, case.expression)
    except DeltatuneError as error:
        return str(error)
    move(delta, seed)
    live = case.logits(model)
    assert live.isfinite().all(), "the output is not finite"
    parts = [part.key for part in delta.parts]
    torch.autograd.backward(case.kin.logits(model, case.kin.batch()).square().sum())
    gradients = named_gradients(delta, 0)
    for part in parts:
        mine = [g for name, g in gradients.items() if name.startswith(f"{part}/")]
        assert any(gradient.any() for gradient in mine), f"{part} gets no gradient"
    _check_parts(case, delta.tensors(), parts, live)
    with tempfile.TemporaryDirectory() as folder:
        again = case.model()
        api.load(api.save(delta, Path(folder) / "delta"), again)
        assert torch.equal(case.logits(again), live), "what is loaded acts otherwise"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        delta.merge()
    except UnsupportedError:
        return SUMMED
    torch.testing.assert_close(case.logits(model), live, rtol=1e-3, atol=1e-3)
    delta.unmerge()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "unmerge"
    return MERGED


def _check_parts(case: Case, values: dict[str, Tensor], parts: list[str], live: Tensor) -> None:
    """Asserts that each part has an effect: left as it begins, the output is another."""
    for part in parts:
        model = case.model()
        fresh = api.attach(model, case.expression)
        start = fresh.tensors()
        fresh.bank.write(
            0, {n: start[n] if n.startswith(f"{part}/") else v for n, v in values.items()}
        )
        assert not torch.equal(case.logits(model), live), f"{part} does nothing"
