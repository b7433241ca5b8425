"""Surveys: what methods want to see of the training data before the first step.

A method whose start comes from data says what it `wants`, and sets its leaves in `settle` from what
was collected. Rows are looked at one at a time, so that no padding is seen, in evaluation mode,
with the delta as it was drawn. The backbone's parameters never take a gradient: that of a weight is
made of what its module reads and of the gradient of what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.calls import read_first
from deltatune.core.chain import Chain, Inner
from deltatune.core.errors import TrainingError
from deltatune.core.leaf import draw
from deltatune.core.link import Link
from deltatune.core.policy import Found, Wanted
from deltatune.core.storage import wide

if TYPE_CHECKING:
    from deltatune.core.delta import Delta
    from deltatune.core.layout import Part

__all__ = ["Survey", "surveys"]


def surveys(delta: Delta, slots: list[int]) -> list[Survey]:
    """What the methods of some slots that are trained just now want to see. Nothing of a slot that
    was trained or loaded: it has its start already.
    """
    return [
        Survey(delta, slot, part, wanted)
        for slot in slots
        for part in delta.trained_parts
        if (wanted := part.method.wanted) is not None and _is_fresh(delta, slot, part)
    ]


class Survey:
    """What one method of one slot wants to see.

    Args:
        delta: attached.
        slot: not frozen.
        part: of the method.
        wanted: what it wants.
    """

    def __init__(self, delta: Delta, slot: int, part: Part, wanted: Wanted) -> None:
        self.delta, self.slot, self.part, self.wanted = delta, slot, part, wanted
        bank = delta.bank
        assert isinstance(bank, Bank)
        self._row = bank.slots[slot]
        self._links = [link for link in delta.links if link.part == part.key]
        self._of_leaves = wanted.kind in ("leaves", "squares")
        self._total = torch.zeros_like(self._row) if self._of_leaves else None
        self._sums: dict[Link | nn.Module, Tensor] = {}
        self._tokens: dict[nn.Module, int] = {}
        self._seen = 0

    @property
    def name(self) -> str:
        """Of the method."""
        return self.part.method.name

    def look(self, forward: Callable[[], Any], items: int) -> None:
        """Looks at one row.

        Args:
            forward: calls the model with the row; the loss of what it gives is a mean over items.
            items: of the row. A gradient is that of the mean over the items of all rows.

        Raises TrainingError for a loss that is not finite.
        """
        kind = self.wanted.kind
        with self.delta.route([self.slot]), self._watching():
            with torch.set_grad_enabled(kind != "inputs"):
                loss = forward().loss
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"The loss of a row that {self.name} looks at is not finite ({float(loss)})."
                )
            times = items if kind in ("gradients", "leaves") else 1
            if kind != "inputs":
                (gradient,) = torch.autograd.grad(loss * times, self._row)
                if self._total is not None:
                    self._total += gradient if kind == "leaves" else gradient.square()
        self._seen += times

    @torch.no_grad()
    def settle(self, memory: Mapping[str, Tensor]) -> None:
        """The method sets its leaves, and its policy's memory. A site that no row has reached keeps
        what was drawn.

        Raises TrainingError if no row was looked at.
        """
        if not self._seen:
            raise TrainingError(f"{self.name} found no row with a label to begin from.")
        for key, total in self._sums.items():
            total /= self._seen if isinstance(key, Link) else self._tokens[key]
        if self._total is not None:
            self._total /= self._seen
        values = self.delta.tensors(self.slot)
        found = [
            Found(link.site, {name: values[full] for name, full in link.names.items()}, seen)
            for link in self._links
            if (seen := self._found(link))
        ]
        self.part.method.settle(found, memory)

    def _found(self, link: Link) -> dict[str, Tensor]:
        if self._total is not None:
            bank = self.delta.bank
            assert isinstance(bank, Bank)
            pieces = bank.own.split(self._total)
            return {name: pieces[full] for name, full in link.names.items() if full in pieces}
        total = self._sums.get(link.site.module if self.wanted.kind == "inputs" else link)
        return {} if total is None or not total.any() else {self.wanted.kind: total}

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Within it every call of a site's module is seen."""
        if self._of_leaves:
            yield
            return
        modules = dict.fromkeys(link.site.module for link in self._links)
        watches = [_Watch(self, self.delta.host.chain(module)) for module in modules]
        for watch in watches:
            watch.chain.arounds.append(watch)
        try:
            yield
        finally:
            for watch in watches:
                watch.chain.arounds.remove(watch)

    def read(self, module: nn.Module, x: Tensor) -> None:
        """Adds x xᵀ of each token that a module reads."""
        self._add(module, x, x)
        self._tokens[module] = self._tokens.get(module, 0) + len(x)

    def pulled(self, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of the weight at each site in a module."""
        for link in self._links:
            if link.site.module is module:
                self._add(link, link.cut(gradient), x)

    def _add(self, key: Link | nn.Module, left: Tensor, right: Tensor) -> None:
        with torch.no_grad(), torch.autocast(left.device.type, enabled=False):
            left, right = wide(left), wide(right)
            if key not in self._sums:
                self._sums[key] = left.new_zeros(left.shape[-1], right.shape[-1])
            self._sums[key].addmm_(left.mT, right)


@dataclass(eq=False)
class _Watch:
    survey: Survey
    chain: Chain

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, _ = read_first(self.chain.names, args, kwargs)
        x, module = given[0].detach().flatten(0, -2), self.chain.module
        y = inner(*args, **kwargs)
        if self.survey.wanted.kind == "inputs":
            self.survey.read(module, x)
        else:
            y.register_hook(lambda g: self.survey.pulled(module, x, g.flatten(0, -2)))
        return y


def _is_fresh(delta: Delta, slot: int, part: Part) -> bool:
    """Whether all leaves stand as they were drawn."""
    held = delta.tensors(slot)
    return all(
        torch.equal(draw(leaf, delta.seeds[slot], name).to(held[name]), held[name])
        for name, leaf in part.leaves.items()
    )
