"""Pruning while training: observe, keep the most important entries, go back, train those alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Category, ReviewCategory
from deltatune.core.policy import Held, Moment
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site

__all__ = ["Pruned", "best", "entries", "masks"]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What methods that find a mask in training have in common; leaves are differences from zero.

    Before the turn every entry is observed, and moves or, where `burning`, stays. At the turn all
    go back to zero, and from then on only those that are kept move.

    Attributes:
        share: of the entries that are kept, over all sites together.
        turn: the share of the budget of training before it.
    """

    share: float = 0.005
    turn: float = 0.3

    name: ClassVar[str]
    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the module, a share kept"
    default_at: ClassVar[str] = "block.linear | block.norm"
    burning: ClassVar[bool] = False  #: whether nothing moves before the turn
    per_tensor: ClassVar[bool] = False  #: whether the share is that of every tensor

    def check(self) -> None:
        """Raises ConfigurationError for shares outside of (0, 1]."""
        if not 0 < self.share <= 1 or not 0 < self.turn < 1:
            raise ConfigurationError(
                f"{self.name}: share lies in (0, 1] and turn in (0, 1); found share={self.share}, "
                f"turn={self.turn}."
            )

    def select(self, site: Site) -> Mapping[str, Form]:
        """Differences of all that a module has."""
        return {name: Difference() for name, value in site.parameters.items() if value is not None}

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Adds what a step tells of the entries of a leaf to their score, in place."""
        raise NotImplementedError

    def worth(self, score: Tensor) -> Tensor:
        """The importance of the entries of a leaf, from their score; the largest are kept."""
        return score.abs()

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        """Score and mask of each leaf, and whether the turn is behind."""
        values = {name: value for name, value, _ in entries(sites)}
        scores = {f"{name}.score": torch.zeros_like(value) for name, value in values.items()}
        kept = {
            f"{name}.kept": torch.ones_like(value, dtype=torch.bool)
            for name, value in values.items()
        }
        device = next(iter(values.values())).device
        return {**scores, **kept, "turned": torch.zeros(1, dtype=torch.bool, device=device)}

    def on_gradients(
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> bool:
        """Observes; at the turn chooses and begins anew; what is not kept gets no gradient."""
        turns = not memory["turned"] and moment.done >= self.turn
        for name, value, gradient in entries(sites):
            if not memory["turned"]:
                self.observe(memory[f"{name}.score"], value, gradient)
        if turns:
            self._choose(sites, memory)
        for name, _, gradient in entries(sites):
            # The gradients of the turn are those of values that are no longer there.
            gradient.zero_() if turns else gradient.mul_(memory[f"{name}.kept"])
        return turns

    def on_step(self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment) -> None:
        """Holds at zero what does not move: decay and momentum would move it."""
        held = self.burning and not memory["turned"]
        for name, value, _ in entries(sites):
            value.zero_() if held else value.mul_(memory[f"{name}.kept"])

    def _choose(self, sites: Sequence[Held], memory: Mapping[str, Tensor]) -> None:
        memory["turned"].fill_(True)
        leaves = list(entries(sites))
        worth = [self.worth(memory[f"{name}.score"]) for name, *_ in leaves]
        chosen = (
            [best(one.flatten(), self.share).view_as(one) for one in worth]
            if self.per_tensor
            else masks(worth, self.share)
        )
        for (name, value, _), mask in zip(leaves, chosen, strict=True):
            memory[f"{name}.kept"].copy_(mask)
            value.zero_()


def best(worth: Tensor, share: float) -> Tensor:
    """Which entries are the most important, as a mask."""
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    count = max(1, round(share * len(worth)))
    chosen[worth.topk(count).indices] = True
    return chosen


def masks(worth: Sequence[Tensor], share: float) -> list[Tensor]:
    """The most important entries of several tensors together, as a mask of each."""
    sizes = [one.numel() for one in worth]
    chosen = torch.split(best(torch.cat([one.flatten() for one in worth]), share), sizes)
    return [mask.view_as(one) for mask, one in zip(chosen, worth, strict=True)]


def entries(sites: Sequence[Held]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value and gradient of each leaf; once for a leaf that several sites share."""
    seen = set[int]()
    for number, held in enumerate(sites):
        for name, gradient in held.gradients.items():
            value = held.values[name]
            if value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                yield f"{number}.{name}", value, gradient
