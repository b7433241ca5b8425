"""MoRA: W' = W + D M C, M a trained square matrix as large as A and B of LoRA together.

Jiang et al. 2024, arXiv:2405.12130. M has r̂ = √(r (in + out)) rows, rounded. C cuts the input into
pieces of r̂ features, the last filled up from the first, and adds them up (the authors' type 1,
their code's default). With `rotate` (their type 6, for small r) M reads every piece by itself,
turned by its number as RoPE turns positions, and r̂ is rounded down to an even number. D lays what
M gives side by side, over and over, and cuts it to the output. M starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.leaf import Leaf, zeros
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site


@register("mora")
@dataclass(frozen=True, kw_only=True)
class MoRA(Method):
    """A square matrix between fixed maps.

    Attributes:
        rank: r, of the LoRA that has as many entries.
        rotate: whether the pieces of the input are told apart.
    """

    rank: int = 8
    rotate: bool = False

    category: ClassVar[Category] = "reparameterisation"
    review_category: ClassVar[ReviewCategory] = "reparameterised"
    default_at: ClassVar[str] = "attention.q | attention.v"
    learning_rate: ClassVar[float] = 1e-3
    count: ClassVar[str] = "r (i + d), to a square"

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"mora: rank must be at least 1; it is {self.rank}.")

    def init(self, site: Site) -> Mapping[str, Leaf]:
        width = int((self.rank * (site.inputs + site.outputs)) ** 0.5 + 0.5)
        width -= width % 2 if self.rotate else 0
        smallest = min(site.inputs, site.outputs)
        if not 0 < width <= smallest:
            raise TargetError(
                f"mora: rank={self.rank} makes a matrix {width} wide at {site.path}, whose smaller "
                f"width is {smallest}. Choose up to {smallest**2 // (site.inputs + site.outputs)}."
            )
        return {"M": zeros(width, width)}

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        one = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        return W + self._added(one, p["M"], W.shape[0]).mT, b

    def fast(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        return y + self._added(x, p["M"], y.shape[-1])

    def _added(self, x: Tensor, M: Tensor, outputs: int) -> Tensor:
        width = M.shape[-1]
        missing = -x.shape[-1] % width
        pieces = torch.unflatten(torch.cat([x, x[..., :missing]], dim=-1), -1, (-1, width))
        if not self.rotate:
            made = pieces.sum(-2) @ M.mT
        else:
            made = (_turned(pieces) @ M.unsqueeze(-3).mT).flatten(-2)
        times = -(-outputs // made.shape[-1])
        return made.repeat(*(1,) * (made.dim() - 1), times)[..., :outputs]


def _turned(pieces: Tensor) -> Tensor:
    """Pieces [..., pieces, width], halves of the n-th turned by n / 10000^(2j / width)."""
    count, width = pieces.shape[-2:]
    steps = torch.arange(0, width, 2, device=pieces.device) / width
    angles = torch.outer(torch.arange(count, device=pieces.device), 10000.0**-steps)
    cos, sin = angles.cos().to(pieces.dtype), angles.sin().to(pieces.dtype)
    first, second = pieces.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
