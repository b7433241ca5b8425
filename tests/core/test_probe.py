"""What a delta changes is seen when it is loaded, and that it changes nothing is said."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.errors import UnsupportedError
from deltatune.core.probe import Probe, outputs_of
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

METHODS = ("lora(rank=2)", "prompt(length=3)", "prefix(length=2)", "adapter", "bitfit", "full")


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_delta_changes_outputs(method: str, family: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].batch()
    delta = dt.attach(model, method)
    move(delta)
    dt.save(delta, tmp_path / "delta")
    delta.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dt.load(tmp_path / "delta", model, inputs=inputs).detach()


@pytest.mark.parametrize("method", ["lora(rank=2)", "ia3", "adapter", "dora(rank=2)", "full"])
def test_a_fresh_delta_is_said_to_do_nothing(method: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].batch()
    delta = dt.attach(model, method)
    dt.save(delta, tmp_path / "delta")
    delta.detach()
    with pytest.warns(UserWarning, match=r"changes none of .* outputs: is it trained") as caught:
        dt.load(tmp_path / "delta", model, inputs=inputs).detach()
    assert caught[0].filename == __file__


def test_outputs_are_compared_number_by_number() -> None:
    one = torch.tensor([[1.0, 2.0, float("nan")]])
    assert Probe.between(one, one) == Probe(3, 0, 0.0)
    assert Probe.between(one, one + torch.tensor([[0.0, 0.5, 0.0]])) == Probe(3, 1, 0.5)
    found = Probe.between(one, torch.tensor([[1.0, 2.0, 3.0]]))
    assert (
        found == Probe(3, 1, float("inf"))
        and str(found) == "changes 1 of 3 outputs, by at most inf"
    )
    states = torch.arange(6.0).reshape(1, 3, 2)
    assert Probe.between(states[:, 1:], states).changed == 0


def test_a_model_without_outputs_is_said() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(UnsupportedError, match="Plain gives neither logits"):
        outputs_of(Plain(), {"x": torch.zeros(1, 1)})
