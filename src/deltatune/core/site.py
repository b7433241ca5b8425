"""Sites: the named places of a backbone where a delta acts.

A `Place` says what a module is (which stack, block, sublayer and part); tables of `backbones` and
inference give it. A `Site` is a place resolved for one face: the module whose call is changed, the
module whose input is read, the slice of a fused projection, and the widths that a method needs to
size its leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltatune.core.quantised import Quantised, error_of, shape_of
from deltatune.core.storage import storage_of
from deltatune.core.whole import first_parameter, identity, whole_parameter

__all__ = ["ATTENTIONS", "Place", "Site", "keep", "originals", "release", "sizes"]

_FROZEN = "_deltatune_frozen"  # on a module: own values of parameters that hold a merged delta
ATTENTIONS = ("self_attention", "cross_attention")


@dataclass(frozen=True)
class Place:
    """What a module is.

    Attributes:
        module: its path in the model.
        stack: "encoder" or "decoder".
        block: index of the block within the stack, None outside of blocks.
        sublayer: "self_attention", "cross_attention", "ffn" or None.
        part: "q", "k", "v", "output", "up", "gate", "down", "norm", "embedding", "head", "pooler",
            "experts": a whole sublayer that chooses among experts; "relative": computed once from
            relative positions, for all rows of a batch.
        share: (i, n) for the i-th of n equal slices of a fused projection; None for all of it.
    """

    module: str
    stack: str
    block: int | None
    sublayer: str | None
    part: str
    share: tuple[int, int] | None = None

    @property
    def role(self) -> str:
        """The canonical name, for example "encoder.block[3].self_attention.q"."""
        block = None if self.block is None else f"block[{self.block}]"
        return ".".join(t for t in (self.stack, block, self.sublayer, self.part) if t)


@dataclass(frozen=True, eq=False)
class Site:
    """One place where one method acts.

    Attributes:
        name: unique among the sites of a method; the key of its leaves in an artefact.
        module: the module whose call is changed.
        path: its path in the model.
        inputs, outputs: widths of what the site reads and writes, in features.
        place: what the module is, None where nothing is known about it.
        entry: the module whose input the site reads, where that is not `module` (a span), with its
            path.
        rows: (start, stop) of the output features of a fused projection, None for all.
        key_width, value_width: features of keys and values, at attention sites; else 0.
        allotted: what `Method.choose`, which sees all sites, says of a parameter or leaf here: what
            falls to it of a budget, or whether it is there.
        members: how many methods a mixer weighs here; width: of a mixer's site, the features of the
            model's hidden states, 0 where they are not known.
        projections: of keys and of values, at attention sites where each is one map of what the
            attention reads; else none.
    """

    name: str
    module: nn.Module = field(repr=False)
    path: str
    inputs: int
    outputs: int
    place: Place | None = None
    entry: tuple[str, nn.Module] | None = field(default=None, repr=False)
    rows: tuple[int, int] | None = None
    key_width: int = 0
    value_width: int = 0
    allotted: Mapping[str, int] = field(default_factory=dict, repr=False)
    members: int = 0
    width: int = 0
    projections: tuple[Site, ...] = field(default=(), repr=False)

    @property
    def stack(self) -> str:
        """The stack it belongs to; "model" where nothing is known about it."""
        return "model" if self.place is None else self.place.stack

    @property
    def block(self) -> int | None:
        """The index of its block within the stack; None outside of blocks."""
        return None if self.place is None else self.place.block

    @property
    def part(self) -> str:
        """The part of its place ("q", "norm", ...), or ""."""
        return "" if self.place is None else self.place.part

    @property
    def parameters(self) -> Mapping[str, nn.Parameter | None]:
        """The module's own parameters by name, absent ones (a missing bias) as None."""
        return self.module._parameters

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of one of `parameters` in plain numbers; None where it is absent."""
        return shape_of(self.module, name)

    def entries(self, name: str) -> int:
        """The number of entries of one of `parameters`; 0 where it is absent."""
        shape = self.shape(name)
        return 0 if shape is None else math.prod(shape)

    def before(self, name: str) -> Tensor | None:
        """The backbone's own value of a parameter that a delta is merged into; else None."""
        held: Mapping[str, Tensor] = self.module.__dict__.get(_FROZEN, {})
        return held.get(name)

    def value(self, name: str) -> Tensor:
        """The backbone's own value of a parameter in full, for initial values; in fp32 where it is
        kept quantised.
        """
        storage = storage_of(self.module)
        if name == "weight" and isinstance(storage, Quantised):
            return storage.dequantise(self.module, torch.float32)
        value = self.before(name)
        value = whole_parameter(self.module, name) if value is None else value
        assert value is not None
        return value

    def table(self) -> Tensor:
        """The embeddings of the vocabulary, [tokens, width], at a site in front of them."""
        assert self.entry is not None
        return first_parameter(self.entry[1])

    def weight(self) -> Tensor:
        """The frozen weight, (outputs, inputs), whatever the module stores; the slice of a fused
        one.
        """
        weight = storage_of(self.module).view(self.value("weight"))
        return weight if self.rows is None else weight[slice(*self.rows)]

    def error(self) -> tuple[Tensor, Tensor] | None:
        """What quantising took from the weight, as far as it was kept: A [rank, inputs] and
        B [outputs, rank], the largest triplets of the error first; None if it was not.
        """
        return error_of(self.module, self.rows)


def sizes(sites: Sequence[Site]) -> dict[tuple[str, str], int]:
    """Entries of every parameter of some sites by (site, parameter), in the order of these names;
    a parameter that is tied counts at the first site.
    """
    first: dict[int, tuple[tuple[str, str], int]] = {}
    for site in sites:
        for name, parameter in site.parameters.items():
            if parameter is not None:
                key = identity(site.module, name)
                first.setdefault(key, ((site.name, name), site.entries(name)))
    return dict(sorted(first.values()))


def keep(module: nn.Module, name: str, value: Tensor) -> None:
    """Remembers a parameter's own value, before the first delta is merged into it."""
    module.__dict__.setdefault(_FROZEN, {}).setdefault(name, value)


def release(module: nn.Module, name: str, value: Tensor) -> None:
    """Forgets it, if `value` is what was kept: the last delta has been unmerged."""
    held: dict[str, Tensor] = module.__dict__[_FROZEN]
    if held.get(name) is value:
        del held[name]
    if not held:
        del module.__dict__[_FROZEN]


def originals(model: nn.Module) -> dict[str, Tensor]:
    """Full name to own value of every parameter that holds a merged delta."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in module.__dict__.get(_FROZEN, {}).items()
    }
