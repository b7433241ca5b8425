"""A model of two linear maps and a norm, and changes of it, for laws on many values."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from deltatune.composition import Change
from deltatune.composition.change import Product


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.two = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.norm(torch.tanh(self.one(x))))
        return out


MODEL = Plain()
SEEDS = st.integers(0, 2**31)


def change(seed: int, model: nn.Module = MODEL) -> Change:
    """Dense, product and vector; every second change leaves the norm alone."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    parts: dict[str, Tensor | Product] = {
        "one.weight": Product(drawn(8, 2), drawn(2, 6)),
        "one.bias": drawn(8),
        "two.weight": drawn(5, 8),
    }
    return Change(model, parts if seed % 2 else {**parts, "norm.weight": drawn(8)})


def flat(found: Change) -> Tensor:
    """All entries in fp64, in the model's order; zeros where it says nothing of one."""
    shapes = {name: v for name, v in MODEL.named_parameters() if name != "norm.bias"}
    held = [found[n] if n in found else torch.zeros_like(v) for n, v in shapes.items()]
    return torch.cat([value.detach().flatten().double() for value in held])
