"""What is true of the dense difference alone."""

from __future__ import annotations

import pytest
import torch

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_of_biases_it_is_bitfit(family: str) -> None:
    kin = FAMILIES[family]
    logits = []
    for method in ("bitfit", "difference(parameters='bias', at='linear | norm')"):
        model = kin.build()
        delta = api.attach(model, method)
        move(delta)
        with torch.no_grad():
            logits.append(kin.logits(model, kin.batch()))
    assert logits[0].equal(logits[1])


def test_it_adds_to_every_entry_of_what_is_named() -> None:
    model = FAMILIES["bert"].build()
    before = {name: value.clone() for name, value in model.named_parameters()}
    delta = api.attach(model, "difference(parameters='weight | bias', at='attention.q')")
    move(delta)
    leaves = {name.partition("/")[2].replace("/", "."): v for name, v in delta.tensors().items()}
    delta.merge()
    for name, value in model.named_parameters():
        assert value.equal(before[name] + leaves[name] if name in leaves else before[name])
    assert {name.rpartition(".")[2] for name in leaves} == {"weight", "bias"}


def test_names_that_name_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="parameters are names"):
        api.attach(FAMILIES["bert"].build(), "difference(parameters='weight |')")
    with pytest.raises(TargetError, match="finds nothing to tune"):
        api.attach(FAMILIES["bert"].build(), "difference(parameters='gain')")
