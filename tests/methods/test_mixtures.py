"""Mixtures of deltas, and deltas that share or leave out, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from tests.methods.linear_map import INPUTS, OUTPUTS, Leaves, Tiny, output
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import parse


def drawn(seed: int, **shapes: tuple[int, ...]) -> Leaves:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }


X = drawn(7, x=(2, 5, INPUTS))["x"]


def base() -> tuple[Tensor, Tensor]:
    """The weight and the bias of the map."""
    map_ = Tiny().double().lin
    return map_.weight.detach(), map_.bias.detach()


def close(found: Tensor, expected: Tensor) -> None:
    # Leaves are kept in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- routed mixtures


def gates(x: Tensor, R: Tensor, chosen: int) -> Tensor:
    """One token's weights, by hand."""
    logits = [float(row @ x) for row in R]
    kept = sorted(range(len(logits)), key=lambda n: -logits[n])[: chosen or len(logits)]
    total = sum(torch.tensor(logits[n], dtype=torch.float64).exp() for n in kept)
    found = torch.zeros(len(logits), dtype=torch.float64)
    for n in kept:
        found[n] = torch.tensor(logits[n], dtype=torch.float64).exp() / total
    return found


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_molora_weighs_its_experts_for_every_token(chosen: int) -> None:
    p = drawn(1, A=(3, 2, INPUTS), B=(3, OUTPUTS, 2), R=(3, INPUTS))
    found = output(f"molora(rank=2, experts=3, alpha=6.0, chosen={chosen})", p, X)
    W, b = base()
    for row, x in zip(found.flatten(0, 1), X.flatten(0, 1), strict=True):
        g = gates(x, p["R"], chosen)
        added = [g[n] * 3.0 * (p["B"][n] @ (p["A"][n] @ x)) for n in range(3)]
        close(row, W @ x + b + torch.stack(added).sum(0))


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_mov_mixes_gains_for_every_token(chosen: int) -> None:
    p = drawn(2, l=(3, OUTPUTS), R=(3, INPUTS))
    found = output(f"mov(experts=3, chosen={chosen})", p, X)
    W, b = base()
    for row, x in zip(found.flatten(0, 1), X.flatten(0, 1), strict=True):
        gain = gates(x, p["R"], chosen) @ (1 + p["l"])
        close(row, gain * (W @ x + b))


def test_experts_that_are_alike_need_no_router() -> None:
    p = drawn(3, A=(2, INPUTS), B=(OUTPUTS, 2), R=(3, INPUTS))
    many = {"A": p["A"].repeat(3, 1, 1), "B": p["B"].repeat(3, 1, 1), "R": p["R"]}
    alone = output("lora(rank=2, alpha=4.0)", p, X)
    close(output("molora(rank=2, experts=3, alpha=4.0)", many, X), alone)
    one = {"A": p["A"][None], "B": p["B"][None], "R": p["R"][:1]}
    close(output("molora(rank=2, experts=1, alpha=4.0)", one, X), alone)


@pytest.mark.parametrize(
    "text",
    ["molora(experts=0)", "molora(rank=0)", "molora(experts=3, chosen=4)", "mov(chosen=-1)"],
)
def test_mixtures_refuse_numbers_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse(text)
