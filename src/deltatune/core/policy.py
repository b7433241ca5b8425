"""Policies: what methods do in training beside following the gradient.

A method may draw its leaves anew in every step (`sample`), ask for an extra loss (`penalty`), train
leaves at rates of their own (`rate`), and act on two events of a step: when the gradients are there
(`on_gradients`) and when the leaves were moved (`on_step`). What it must remember from step to step
are named tensors (`remember`), which a checkpoint holds. Before the first step it may look at rows
of the training data (`wanted`) and set its leaves from what was seen (`settle`). The training loop
knows none of it but the events, and every slot has memory and draws of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from deltatune.core.errors import ArtefactError
from deltatune.core.leaf import generator
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.bank import Flat
    from deltatune.core.delta import Delta
    from deltatune.core.layout import Part
    from deltatune.core.method import Method

__all__ = [
    "Draws",
    "Found",
    "Held",
    "Kind",
    "Moment",
    "Policies",
    "Wanted",
    "penalty",
    "rate_factors",
    "sampled",
]


@dataclass(frozen=True)
class Draws:
    """The chance of one step of one slot.

    Attributes:
        seed: of the slot.
        step: its number.
    """

    seed: int
    step: int

    def of(self, *place: object) -> torch.Generator:
        """A CPU generator that depends on slot, step and `place` alone; without a place it is that
        of all sites.
        """
        return generator("policy", self.seed, self.step, *place)


@dataclass(frozen=True)
class Held:
    """What a policy sees of a site. Changes in place act on the delta.

    Attributes:
        site: where.
        values: the trained and fixed leaves by name, detached.
        gradients: of the trained leaves.
    """

    site: Site
    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """When an event happens.

    Attributes:
        step: optimiser steps taken before this one.
        done: the fraction of the budget that was spent before it, in [0, 1).
        draws: its chance.
    """

    step: int
    done: float
    draws: Draws


Kind = Literal["inputs", "gradients", "leaves", "squares"]


@dataclass(frozen=True)
class Wanted:
    """What a method wants to see before the first step.

    Attributes:
        kind: "inputs": of each site the mean of x xᵀ over all tokens that it reads, [inputs,
            inputs]; "gradients": of each site the gradient of the mean loss with respect to its
            weight, [outputs, inputs]; "leaves": of each trained leaf the gradient of the mean loss;
            "squares": of each trained leaf the mean over rows of the squared gradient of a row's
            loss. The first two are for the `weight` face.
        rows: how many rows of the training data, in the order in which they are trained on first;
            all of them where there are fewer.
    """

    kind: Kind
    rows: int


@dataclass(frozen=True)
class Found:
    """What was seen at a site. Changes of the values in place act on the delta.

    Attributes:
        site: where.
        values: the trained and fixed leaves by name, detached.
        seen: "inputs", "gradients" or "activations" to what was collected; of the others leaf
            names.
    """

    site: Site
    values: Mapping[str, Tensor]
    seen: Mapping[str, Tensor]


class Policies:
    """The policies of some slots of a delta.

    Args:
        delta: attached.
        slots: which.
    """

    def __init__(self, delta: Delta, slots: Sequence[int]) -> None:
        self.delta = delta
        acting = [part for part in _moving(delta) if part.method.has_policy()]
        self.acting = {(slot, part.key): part.method for slot in slots for part in acting}
        self.memory = {
            key: dict(method.remember(self._held(*key))) for key, method in self.acting.items()
        }

    def on_gradients(self, step: int, done: float) -> bool:
        """The gradients of a step are there, clipped; the optimiser has not read them yet.

        Returns whether it begins anew.
        """
        found = [
            method.on_gradients(self._held(*key), self.memory[key], self._moment(key, step, done))
            for key, method in self.acting.items()
        ]
        return any(found)

    def on_step(self, step: int, done: float) -> None:
        """The optimiser has moved the leaves; the gradients are still there."""
        for key, method in self.acting.items():
            method.on_step(self._held(*key), self.memory[key], self._moment(key, step, done))

    def tensors(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint. Its names name no slot, as those of a run of its own."""
        first = min((slot for slot, _ in self.acting), default=0)
        return {
            f"{slot - first}/{part}/{name}": value
            for (slot, part), memory in self.memory.items()
            for name, value in memory.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises ArtefactError if they do not fit."""
        there = self.tensors()
        shapes = {name: value.shape for name, value in tensors.items()}
        if {name: value.shape for name, value in there.items()} != shapes:
            raise ArtefactError("The checkpoint holds the memory of another method's policy.")
        for name, value in there.items():
            value.copy_(tensors[name])

    def _moment(self, key: tuple[int, str], step: int, done: float) -> Moment:
        return Moment(step, done, Draws(self.delta.seeds[key[0]], step))

    def _held(self, slot: int, part: str) -> list[Held]:
        values, gradients = self.delta.tensors(slot), self.delta.bank.gradients(slot)
        return [
            Held(
                link.site,
                {name: values[full] for name, full in link.names.items()},
                {name: gradients[full] for name, full in link.names.items() if full in gradients},
            )
            for link in self.delta.links
            if link.part == part
        ]


def _moving(delta: Delta) -> list[Part]:
    """The parts whose leaves training moves: not those of a mixer that keeps its members."""
    return [part for part in delta.trained_parts if any(o.trained for o in part.leaves.values())]


def penalty(delta: Delta, slots: Sequence[int]) -> Tensor | None:
    """What the methods of a delta add to the loss of some slots; None where they add nothing."""
    methods = {part.key: part.method for part in _moving(delta) if part.method.has_penalty()}
    terms: list[Tensor] = []
    for slot in slots if methods else ():
        held = delta.bank.read(slot)
        for key, method in methods.items():
            links = [link for link in delta.links if link.part == key]
            leaves = [{n: held[full] for n, full in link.names.items()} for link in links]
            term = method.penalty(leaves)
            terms += [] if term is None else [term]
    return torch.stack(terms).sum() if terms else None


def rate_factors(delta: Delta, flat: Flat) -> tuple[tuple[int, int, float], ...]:
    """Which entries of a flat tensor of the bank train at a rate of their own: (start, stop,
    factor). That of parts of other stages is 0: not a bit of them moves.
    """
    methods = {part.key: part.method for part in delta.trained_parts}
    found: list[tuple[int, int, float]] = []
    stop = 0
    for name, size in zip(flat.shapes, flat.sizes, strict=True):
        start, stop = stop, stop + size
        part, *_, leaf = name.split("/")
        factor = methods[part].rate(leaf) if part in methods else 0.0
        if factor != 1.0:
            found.append((start, stop, factor))
    return tuple(found)


def sampled(
    method: Method, site: Site, leaves: Mapping[str, Tensor], draws: Sequence[Draws]
) -> dict[str, Tensor]:
    """Leaves [slots, ...] after each slot has drawn its own."""
    found = [
        method.sample(site, {name: leaf[place] for name, leaf in leaves.items()}, one)
        for place, one in enumerate(draws)
    ]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}
