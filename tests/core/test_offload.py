"""Backbones that accelerate keeps elsewhere, in memory or on disk, one module at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tests.methods.test_conformance import ARMS, CATALOGUE
from torch import Tensor, nn

from deltatune import api
from deltatune.core.artefact import backbone_of
from deltatune.core.delta import Delta
from deltatune.core.errors import StateError, UnsupportedError
from deltatune.testing.case import Case, close, close_gradients, marks, move

Offload = Callable[[nn.Module, Path], None]


def to_memory(model: nn.Module, folder: Path) -> None:
    del folder
    cpu_offload(model, torch.device("cpu"))


def to_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, str(folder), torch.device("cpu"))


def both(case: Case, model: nn.Module, delta: Delta) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of all that is trained."""
    logits = case.kin.logits(model, case.kin.batch())  # type: ignore[arg-type]
    torch.autograd.backward(logits.square().sum())
    found = [row.grad.flatten() for row in delta.bank.slots if row.grad is not None]
    return logits.detach(), torch.cat(found)


# Families, and which comes first, by turns; all of them for the arms of the paper.
TURNS = [("t5", True), ("llama", False), ("t5", False), ("llama", True)]
DELTAS = [
    (method, to_memory, *turn)
    for method, turn in zip(CATALOGUE, itertools.cycle(TURNS), strict=False)
    if method != "full"  # it trains the backbone itself, which must lie whole
] + [
    (method, offload, *turn)
    for method, offload in [*((one, to_memory) for one in ARMS), (ARMS[-1], to_disk)]
    for turn in TURNS
]


@pytest.mark.parametrize(("method", "offload", "family", "first"), DELTAS)
def test_a_delta_acts_on_an_offloaded_backbone(
    method: str, family: str, offload: Offload, first: bool, tmp_path: Path
) -> None:
    case = Case(method, family)
    with case.attached() as (whole, twin):
        expected, wanted = both(case, whole, twin)
    model = case.model()
    if not first:
        offload(model, tmp_path)
        before = marks(model)
    delta = api.attach(model, case.expression)
    if first:
        offload(model, tmp_path)
    move(delta)
    for name, value in delta.tensors().items():  # drawn from weights that lie elsewhere
        assert torch.equal(value, twin.tensors()[name])
    logits, gradient = both(case, model, delta)
    close(logits, expected)
    close_gradients(gradient, wanted)
    mine, theirs = backbone_of(delta), backbone_of(twin)
    assert theirs.difference(mine) is None and mine.weights == theirs.weights
    with pytest.raises(UnsupportedError):
        delta.merge()
    delta.detach()
    base = case.logits(case.model())
    close(case.logits(model), base)
    if not first:
        assert marks(model) == before


def test_the_control_is_told_when_its_parameters_were_replaced() -> None:
    case = Case("full", "bert")
    with case.attached() as (model, _):
        name, parameter = next(model.named_parameters())
        path, _, own = name.rpartition(".")
        again = nn.Parameter(parameter.detach().clone())
        model.get_submodule(path).register_parameter(own, again)
        with pytest.raises(StateError, match="Attach it afterwards"):
            case.logits(model)
