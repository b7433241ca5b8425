"""Leaves: the named tensors of a delta, described before they exist.

A method says which leaves a site needs; the kernel decides where they live. A description is enough
to count, to plan and to build on the `meta` device; drawing is keyed by (seed, name), in fp32 on
the CPU, so that a leaf does not depend on the order of modules, on the device or on what else is
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import xxhash
from torch import Tensor

__all__ = [
    "Leaf",
    "constant",
    "draw",
    "fixed",
    "generator",
    "given",
    "identity",
    "key_of",
    "normal",
    "ones",
    "places",
    "uniform",
    "zeros",
]

Fill = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Leaf:
    """One tensor of a delta at one site.

    Attributes:
        shape: its shape, without the slot axis.
        fill: makes the initial value from (shape, generator).
        tie: leaves of one method with equal names and equal `tie` are one tensor, whatever their
            sites.
        trained: whether the optimiser sees it; it is fp32 then. Untrained leaves are stored all the
            same.
        dtype: of an untrained leaf; indices are int64.
    """

    shape: tuple[int, ...]
    fill: Fill
    tie: str | None = None
    trained: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def count(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def tied(self, tie: str) -> Leaf:
        """The same leaf, shared by all sites that name the same `tie`."""
        return replace(self, tie=tie)


@dataclass(frozen=True)
class _Normal:
    std: float

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=random).mul_(self.std)


@dataclass(frozen=True)
class _Uniform:
    bound: float

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=random).mul_(2).sub_(1).mul_(self.bound)


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        del random
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class _Places:
    entries: int

    def __call__(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return torch.randperm(self.entries, generator=random)[: shape[0]]


def normal(*shape: int, std: float) -> Leaf:
    """A leaf drawn from N(0, std²)."""
    return Leaf(shape, _Normal(std))


def uniform(*shape: int, bound: float) -> Leaf:
    """A leaf drawn from U(-bound, bound)."""
    return Leaf(shape, _Uniform(bound))


def constant(*shape: int, value: float) -> Leaf:
    """A leaf that begins with one value everywhere."""
    return Leaf(shape, _Constant(value))


def zeros(*shape: int) -> Leaf:
    """A leaf of zeros."""
    return constant(*shape, value=0.0)


def ones(*shape: int) -> Leaf:
    """A leaf of ones."""
    return constant(*shape, value=1.0)


def given(shape: tuple[int, ...], fill: Fill) -> Leaf:
    """A leaf with a fill of its own, for values that come from the backbone or from data."""
    return Leaf(shape, fill)


def fixed(shape: tuple[int, ...], fill: Fill, dtype: torch.dtype = torch.float32) -> Leaf:
    """A leaf that is stored and never trained: indices, masks."""
    return Leaf(shape, fill, trained=False, dtype=dtype)


def identity(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A fill: ones on the diagonal [d, d]."""
    del random
    return torch.eye(*shape)


def places(count: int, entries: int) -> Leaf:
    """So many different places among the entries of a flattened tensor, drawn once, int64."""
    return fixed((count,), _Places(entries), torch.int64)


def key_of(*parts: object) -> int:
    """A seed, 63 bits, that depends on `parts` alone."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) & (2**63 - 1)


def generator(*key: object) -> torch.Generator:
    """A CPU generator that depends on `key` alone."""
    return torch.Generator().manual_seed(key_of(*key))


def draw(leaf: Leaf, seed: int, name: str) -> Tensor:
    """The initial value of the leaf called `name`, on the CPU."""
    value = leaf.fill(leaf.shape, generator("leaf", seed, name))
    if tuple(value.shape) != leaf.shape:
        raise ValueError(
            f"The leaf {name} was announced as {leaf.shape}, drawn as {tuple(value.shape)}."
        )
    return value.detach().to("cpu", leaf.dtype)
