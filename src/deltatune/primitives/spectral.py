"""Factors that a decomposition of the frozen weight gives: computed once for a site, then handed
to the leaves that begin with them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, fixed, given, zeros
from deltatune.core.site import Site
from deltatune.core.storage import wide
from deltatune.primitives.low_rank import LowRank

__all__ = ["Decomposition", "Recentred", "Spectral", "balanced", "triplets"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """What is made of the weight of one site, on the CPU. Each part is held until its leaf takes
    it.

    Attributes:
        site: whose weight.
        split: makes the parts, by name, of the weight [outputs, inputs].
    """

    site: Site
    split: Callable[[Tensor], Mapping[str, Tensor]]
    held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One part; zeros of its shape where the weight has no values."""
        weight = self.site.weight()
        if weight.is_meta:
            return torch.zeros(shape)
        if name not in self.held:
            self.held.update(self.split(wide(weight.detach()).cpu()))
        return self.held.pop(name)

    def leaf(self, name: str, *shape: int) -> Leaf:
        """A trained leaf that begins with a part."""
        return given(shape, _Part(self, name))

    def fixed(self, name: str, *shape: int) -> Leaf:
        """An untrained leaf that holds a part."""
        return fixed(shape, _Part(self, name))


@dataclass(frozen=True)
class _Part:
    whole: Decomposition
    name: str

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        return self.whole.take(self.name, shape)


def triplets(W: Tensor, kept: slice) -> tuple[Tensor, Tensor, Tensor]:
    """U [outputs, kept], S [kept] and Vᵀ [kept, inputs] of a weight, singular values falling."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, kept], S[kept], V[kept]


def balanced(W: Tensor, kept: slice, scale: float) -> tuple[Tensor, Tensor]:
    """A [kept, inputs] and B [outputs, kept], roots of singular values in both: scale B A is that
    part of the weight.
    """
    U, S, V = triplets(W, kept)
    root = (S / scale).sqrt()
    return root[:, None] * V, U * root


@dataclass(frozen=True, kw_only=True)
class Recentred(LowRank):
    """LoRA that counts from where it begins: W' = W + (alpha / rank) (B A - B0 A0).

    B A - B0 A0 = (B - B0) A + B0 (A - A0), a product of rank 2 r, which is exactly zero as long as
    nothing has moved. Without a start of its own A0 and B0 are zero, and this is LoRA.
    """

    count: ClassVar[str] = "r (i + d)"

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """A and B, trained, as those of LoRA, and A0 and B0 of their shapes, untrained, zero.

        Raises TargetError for a rank above the smaller width of the site.
        """
        trained = super().init(site)
        start = {f"{n}0": replace(zeros(*leaf.shape), trained=False) for n, leaf in trained.items()}
        return {**trained, **start}

    def factors(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[A; A - A0] and (alpha / rank) [B - B0, B0]."""
        A = torch.cat([p["A"], p["A"] - p["A0"]], dim=-2)
        B = torch.cat([p["B"] - p["B0"], p["B0"]], dim=-1)
        return A, self.scale * B

    def begin(self, p: Mapping[str, Tensor], A: Tensor, B: Tensor) -> None:
        """Writes a start into the leaves."""
        for name, value in {"A": A, "B": B, "A0": A, "B0": B}.items():
            p[name].copy_(value)


@dataclass(frozen=True, kw_only=True)
class Spectral(Recentred, abc.ABC):
    """LoRA whose factors begin in the weight: W' = W + (alpha / rank) (B A - B0 A0).

    The authors take the start B0 A0 out of W; here W stays, and the start is kept beside what is
    trained.

    Attributes:
        alpha: with that of the authors, the rank, the product is scaled by one.
    """

    alpha: float = 8.0

    @abc.abstractmethod
    def start(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """A0 [rank, inputs] and B0 [outputs, rank] of a weight [outputs, inputs]."""

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """A and B, trained, and the same untrained as A0 and B0.

        Raises TargetError for a rank above the smaller width of the site.
        """
        drawn = Decomposition(site, self._parts)
        leaves = super().init(site)
        return {
            name: (drawn.leaf if leaf.trained else drawn.fixed)(name, *leaf.shape)
            for name, leaf in leaves.items()
        }

    def _parts(self, W: Tensor) -> Mapping[str, Tensor]:
        A, B = self.start(W)
        return {"A": A, "B": B, "A0": A, "B0": B}
