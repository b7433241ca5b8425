"""Experts: several leaves of one form at a site, and routers that weigh them by what is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Fill, Leaf, normal
from deltatune.core.site import Site

__all__ = ["Experts", "Routed", "alike", "several", "shares"]


def several(leaves: Mapping[str, Leaf], experts: int) -> dict[str, Leaf]:
    """The same leaves once for each expert, [experts, ...], each with a draw of its own."""
    return {name: replace(leaf, shape=(experts, *leaf.shape)) for name, leaf in leaves.items()}


def alike(leaf: Leaf, experts: int) -> Leaf:
    """The same leaf once for each expert, [experts, ...], all with one draw."""
    return replace(leaf, shape=(experts, *leaf.shape), fill=_Alike(leaf.fill))


@dataclass(frozen=True)
class _Alike:
    fill: Fill

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return self.fill(shape[1:], random).expand(shape)


def shares(logits: Tensor, chosen: int = 0) -> Tensor:
    """The softmax of logits [..., experts], over the `chosen` largest alone; 0 for all."""
    if 0 < chosen < logits.shape[-1]:
        least = logits.topk(chosen).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What methods with experts have in common; a method says what they are.

    Attributes:
        experts: n, how many a site has.
    """

    experts: int = 8

    name: ClassVar[str]

    def check(self) -> None:
        """Raises ConfigurationError for less than one expert."""
        super().check()  # type: ignore[misc]
        if self.experts < 1:
            raise ConfigurationError(
                f"{self.name}: experts must be at least 1; it is {self.experts}."
            )


@dataclass(frozen=True, kw_only=True)
class Routed(Experts):
    """Experts with a router: g(x) = softmax(R x), one weight for each expert and token.

    Attributes:
        chosen: how many experts a token takes, those of the largest weights, whose softmax it then
            is; 0 for all.
    """

    experts: int = 10
    chosen: int = 0

    def check(self) -> None:
        """Raises ConfigurationError for more experts chosen than there are."""
        super().check()
        if not 0 <= self.chosen <= self.experts:
            raise ConfigurationError(
                f"{self.name}: chosen lies in 0 to experts={self.experts}; it is {self.chosen}."
            )

    def idle(self, site: Site, leaf: str) -> bool:
        """The router, where a token has nothing to weigh: its one expert has the weight 1."""
        del site
        return leaf == "R" and 1 in (self.experts, self.chosen)

    def router(self, site: Site) -> dict[str, Leaf]:
        """R [experts, inputs], from N(0, 0.02²)."""
        return {"R": normal(self.experts, site.inputs, std=0.02)}

    def weights(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """g(x), [..., experts], of x [..., inputs]."""
        return shares(functional.linear(x, p["R"]), self.chosen)
