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

__all__ = ["FirstOrder", "Pruned", "Pruning", "best", "entries", "masks"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What methods that find a mask in training have in common.

    Before the turn every entry is observed, and moves or, where `burning`, stays. At the turn those
    that are kept go back to where they began, all others to zero, where they stay.

    Attributes:
        share: of the entries that are kept, over all sites together.
        turn: the share of the budget of training before it.
    """

    share: float = 0.005
    turn: float = 0.3

    name: ClassVar[str]
    from_zero: ClassVar[bool] = True  #: whether all leaves begin at zero
    burning: ClassVar[bool] = False  #: whether nothing moves before the turn
    per_tensor: ClassVar[bool] = False  #: whether the share is that of every tensor

    def check(self) -> None:
        """Raises ConfigurationError for shares outside of (0, 1]."""
        if not 0 < self.share <= 1 or not 0 < self.turn < 1:
            raise ConfigurationError(
                f"{self.name}: share lies in (0, 1] and turn in (0, 1); found share={self.share}, "
                f"turn={self.turn}."
            )

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Adds what a step tells of the entries of a leaf to their score, in place."""
        raise NotImplementedError

    def worth(self, score: Tensor) -> Tensor:
        """The importance of the entries of a leaf, from their score; the largest are kept."""
        return score.abs()

    def worths(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The importance of the entries of all leaves of a site."""
        return {name: self.worth(score) for name, score in scores.items()}

    @property
    def whole(self) -> bool:
        """Whether what is equally important is kept together, the share being met by the last."""
        return False

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        """Score and mask of each leaf, where it began, and whether the turn is behind."""
        values = {name: value for name, value, _ in entries(sites)}
        scores = {f"{name}.score": torch.zeros_like(value) for name, value in values.items()}
        kept = {
            f"{name}.kept": torch.ones_like(value, dtype=torch.bool)
            for name, value in values.items()
        }
        device = next(iter(values.values())).device
        starts = {} if self.from_zero else {f"{n}.start": v.clone() for n, v in values.items()}
        return {
            **scores,
            **kept,
            **starts,
            "turned": torch.zeros(1, dtype=torch.bool, device=device),
        }

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
        scores: dict[str, dict[str, Tensor]] = {}
        for name, *_ in entries(sites):
            number, _, leaf = name.partition(".")
            scores.setdefault(number, {})[leaf] = memory[f"{name}.score"]
        worth = {
            f"{number}.{leaf}": one
            for number, of_site in scores.items()
            for leaf, one in self.worths(of_site).items()
        }
        groups = [[one] for one in worth] if self.per_tensor else [list(worth)]
        for group in groups:
            chosen = masks([worth[name] for name in group], self.share, whole=self.whole)
            for name, mask in zip(group, chosen, strict=True):
                memory[f"{name}.kept"].copy_(mask)
        for name, value, _ in entries(sites):
            if self.from_zero:
                value.zero_()
            else:
                value.copy_(memory[f"{name}.start"] * memory[f"{name}.kept"])


@dataclass(frozen=True, kw_only=True)
class Pruned(Pruning):
    """Pruning of differences of all that a module has."""

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "all of the module, a share kept"
    default_at: ClassVar[str] = "block.linear | block.norm"

    def select(self, site: Site) -> Mapping[str, Form]:
        """Differences of all that a module has."""
        return {name: Difference() for name, value in site.parameters.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Pruning):
    """Pruning by |Σ w dL/dw| over the steps before the turn: what setting an entry to zero would
    cost in first order.

    Attributes:
        structured: whether whole groups of entries are kept, by the sums over each; the last one
            that the share allows is kept whole.
    """

    share: float = 0.5
    structured: bool = False

    axes: ClassVar[Mapping[str, int]] = {}  #: leaf -> axis; equal indices of a site are one group

    @property
    def whole(self) -> bool:
        """See Pruning."""
        return self.structured

    def observe(self, score: Tensor, value: Tensor, gradient: Tensor) -> None:
        """See Pruning."""
        score.add_(value * gradient)

    def worths(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See Pruning. A leaf without an axis is a group of its own."""
        if not self.structured:
            return super().worths(scores)
        along = {n: score.movedim(self.axes[n], 0) for n, score in scores.items() if n in self.axes}
        sums = sum(one.reshape(len(one), -1).sum(1) for one in along.values())
        found = {name: score.sum().abs().expand_as(score) for name, score in scores.items()}
        for name, one in along.items():
            assert isinstance(sums, Tensor)
            spread = sums.abs().view(-1, *[1] * (one.dim() - 1)).expand_as(one)
            found[name] = spread.movedim(0, self.axes[name])
        return found


def best(worth: Tensor, share: float, *, whole: bool = False) -> Tensor:
    """Which entries are the most important, as a mask; with `whole` also those that are as
    important as the last of them.
    """
    values, places = worth.topk(max(1, round(share * len(worth))))
    if whole:
        return worth >= values[-1]
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    chosen[places] = True
    return chosen


def masks(worth: Sequence[Tensor], share: float, *, whole: bool = False) -> list[Tensor]:
    """The most important entries of several tensors together, as a mask of each; see `best`."""
    sizes = [one.numel() for one in worth]
    joined = torch.cat([one.flatten() for one in worth])
    chosen = torch.split(best(joined, share, whole=whole), sizes)
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
