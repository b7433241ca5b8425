"""Forms of a selected parameter: how `select` tunes Θ without touching it.

Each form is a leaf (or two) and a fold on one named parameter of a module. Whatever the form,
composition reads it as a difference added to what stands there already, so that two deltas on one
parameter add up.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.leaf import Fill, Leaf, fixed, given, zeros
from deltatune.core.site import Site
from deltatune.core.storage import storage_of, wide

__all__ = ["Difference", "Form", "Rows", "Sparse", "Values"]


class Form(abc.ABC):
    """How one parameter is tuned."""

    additive: bool = False  #: whether, on a bias, the fold is an addition to the module's output

    @abc.abstractmethod
    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        """The leaves of one parameter, by name."""

    @abc.abstractmethod
    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        """The new value of the parameter, fp32.

        Args:
            incoming: its value after the deltas before this one.
            base: its frozen value.
            p: the leaves of the site.
            name: the parameter's name.
        """


@dataclass(frozen=True)
class Difference(Form):
    """W' = W + d, d zero at the start; also where the parameter does not exist yet (a bias)."""

    additive = True

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        """See Form."""
        return {parameter: zeros(*_shape(site, parameter))}

    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        """See Form."""
        del base
        return incoming + p[name]


@dataclass(frozen=True)
class Values(Form):
    """W' = v, v a copy of W at the start; kept as values so that what is loaded is exactly what was
    saved.
    """

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        """See Form."""
        return {parameter: given(_shape(site, parameter), _Copy(site, parameter))}

    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        """See Form."""
        return p[name] if incoming is base else incoming + (p[name] - base)


@dataclass(frozen=True)
class Sparse(Form):
    """W' = W with v added at chosen entries of the flattened parameter.

    Attributes:
        count: how many entries.
        indices: makes their int64 indices, [count], from (shape, generator). They are stored, not
            trained.
    """

    count: int
    indices: Fill

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        """See Form."""
        return {
            parameter: zeros(self.count),
            f"{parameter}.indices": fixed((self.count,), self.indices, torch.int64),
        }

    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        """See Form."""
        del base
        added = incoming.flatten().index_add(0, p[f"{name}.indices"], p[name])
        return added.view_as(incoming)


@dataclass(frozen=True)
class Rows(Form):
    """W' = W with d added to chosen rows, d zero at the start.

    Attributes:
        rows: their indices along the first dimension, each once. They are stored.
    """

    rows: tuple[int, ...]

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        """See Form."""
        count = len(self.rows)
        return {
            parameter: zeros(count, *_shape(site, parameter)[1:]),
            f"{parameter}.rows": fixed((count,), _Given(self.rows), torch.int64),
        }

    def fold(self, incoming: Tensor, base: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
        """See Form."""
        del base
        return incoming.index_add(0, p[f"{name}.rows"], p[name])


@dataclass(frozen=True)
class _Given:
    values: tuple[int, ...]

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        return torch.tensor(self.values).view(shape)


@dataclass(frozen=True)
class _Copy:
    site: Site
    parameter: str

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        value = self.site.value(self.parameter)
        if value.is_meta:
            return torch.zeros(shape)
        return wide(value.detach()).clone()


def _shape(site: Site, parameter: str) -> tuple[int, ...]:
    shape = site.shape(parameter)
    if shape is not None:
        return shape
    return (storage_of(site.module).widths(site.module)[1],)
