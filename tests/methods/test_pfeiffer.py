"""Pfeiffer's bottleneck at norms that are run twice, as its authors have it in post-norm models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

from deltatune import api
from deltatune.core.errors import TargetError
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES
from deltatune.testing.methods import Case, Law, laws

TWICE = "pfeiffer(bottleneck=4, twice=True, at='output.LayerNorm')"


@pytest.mark.parametrize("law", laws(slow=False), ids=lambda law: law.__name__)
def test_it_holds_what_every_method_does(law: Law, tmp_path: Path) -> None:
    law(Case(TWICE, "bert"), tmp_path)


def test_the_norm_is_run_in_front_of_it_and_behind_it() -> None:
    model = FAMILIES["bert"].build()
    norm = model.get_submodule("bert.encoder.layer.0.output.LayerNorm")
    assert isinstance(norm, nn.LayerNorm)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    delta = api.attach(model, TWICE.replace("'output", "'0.output"))
    torch.testing.assert_close(norm(x), y)
    move(delta)
    p = {
        name.rsplit("/", 1)[1]: value
        for name, value in delta.tensors().items()
        if name.startswith("pfeiffer/bert.encoder.layer.0.output.")
    }
    z = linear(torch.relu(linear(y, p["D"], p["c"])), p["U"], p["e"])
    wanted = layer_norm(x + z, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("method", ["pfeiffer(twice=True)", "pfeiffer(twice=True, at='norm')"])
def test_it_stands_at_norms_alone(method: str) -> None:
    family = "bert" if "at" not in method else "llama"
    with pytest.raises(TargetError, match="stands at a LayerNorm"):
        api.attach(FAMILIES[family].build(), method)
