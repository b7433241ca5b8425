"""One linear map with a method on it, ours beside PEFT's: what tests of formulas share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune import api
from deltatune.core.grammar import parse

INPUTS, OUTPUTS = 16, 24
Leaves = dict[str, Tensor]


class Tiny(nn.Module):
    """One linear map."""

    def __init__(self, inputs: int = INPUTS, outputs: int = OUTPUTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(x)
        return out


def output(method: str, leaves: Leaves, x: Tensor) -> Tensor:
    """What one linear map gives with a method whose leaves are these."""
    model = Tiny(x.shape[-1]).double().eval()
    delta = api.attach(model, method, at="lin")
    for name, place in delta.bank.read(0).items():
        if name.rpartition("/")[2] in leaves:
            with torch.no_grad():
                place.copy_(leaves[name.rpartition("/")[2]])
    out: Tensor = model(x)
    return out


def plain(name: str) -> str:
    return name.replace(".default", "").replace("default", "").removesuffix(".weight").strip(".")


Map = dict[str, str] | Callable[[Leaves], Leaves]


def with_peft(
    method: str, name: str, fields: dict[str, Any], names: Map, inputs: int = INPUTS
) -> tuple[Tensor, Tensor]:
    """Our output and that of PEFT's class `name`, in float64, at the same moved leaves.

    Args:
        method: in our grammar.
        name, fields: of PEFT's configuration.
        names: theirs to ours, or what makes our leaves of theirs.
        inputs: the width of what the map reads.
    """
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    fields = {"target_modules": ["lin"], "init_weights": False, **fields}
    config = getattr(peft, name)(**{k: v for k, v in fields.items() if v is not None})
    theirs = peft.get_peft_model(Tiny(inputs).double(), config)
    layer = theirs.base_model.model.lin
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    found = {plain(key): value.detach() for key, value in held.items() if "base" not in key}
    random = torch.Generator().manual_seed(1)
    for key, value in found.items():  # some of PEFT's own starts are the identity
        if value.is_floating_point() and key not in ("vera_A", "vera_B", "boft_P"):
            value.add_(0.3 * torch.randn(value.shape, generator=random, dtype=torch.float64))
    if name in ("FourierFTConfig", "WaveFTConfig"):
        kept = layer.indices if name == "FourierFTConfig" else layer.waveft_indices
        rows, columns = kept["default"]
        found["places"] = rows * inputs + columns
    leaves = names(found) if callable(names) else {ours: found[k] for k, ours in names.items()}
    x = torch.randn(5, inputs, generator=random, dtype=torch.float64)
    return output(method, leaves, x), theirs(x)


def changed(method: str, inputs: int = INPUTS) -> tuple[Tensor, Tensor, Tensor, Leaves]:
    """(W, W', b', leaves) of a map with a method whose leaves were moved."""
    model = Tiny(inputs)
    delta = api.attach(model, method, at="lin")
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for row in delta.bank.slots:
            row.add_(0.3 * torch.randn(row.shape, generator=random))
    W = model.lin.weight.detach().clone()
    leaves = {name.rpartition("/")[2]: v.detach() for name, v in delta.bank.read(0).items()}
    (method_,) = parse(method)
    new, bias = method_.weight(W, model.lin.bias.detach(), leaves)
    assert bias is not None
    return W, new, bias, leaves
