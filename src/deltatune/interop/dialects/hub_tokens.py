"""AdapterHub's prefixes, and its edits of the residual stream at some tokens (ReFT)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltatune.core.errors import ArtefactError
from deltatune.core.grammar import build
from deltatune.core.method import Leaves
from deltatune.core.site import Site
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.hub_places import Ground
from deltatune.interop.pieces import Piece, Shapes

__all__ = ["PREFIX", "REFT", "prefixes", "refts"]

PREFIX = Keys(
    read={
        "architecture": "prefix_tuning",
        "leave_out": None,
        "flat": False,
        "prefix_length": 30,
        "bottleneck_size": 512,
    },
    only={"use_gating": (False,), "non_linearity": ("tanh",)},
    # The first two are of an encoder-decoder.
    idle=frozenset({"cross_prefix", "encoder_prefix", "dropout", "shared_gating"})
    | frozenset({"init_weights_seed"}),
)  #: of `PrefixTuningConfig`
REFT = Keys(
    read={
        "architecture": "reft",
        "layers": "all",
        "prefix_positions": 3,
        "suffix_positions": 0,
        "r": 1,
        "orthogonality": None,
        "tied_weights": False,
    },
    only={
        "non_linearity": (None,),
        "output_reft": (True,),
        "subtract_projection": (True,),
    },
    idle=frozenset({"dropout", "dtype", "init_weights_seed"}),
)  #: of `ReftConfig`


def prefixes(configuration: Configuration, ground: Ground) -> Iterator[Piece]:
    """The pieces of a prefix; the numbers that an MLP makes are what is read of it. Raises
    ArtefactError.
    """
    if ground.kind == "t5":
        raise ArtefactError(
            f"{ground.where}: with relative positions (T5) the text stands at other positions in "
            "AdapterHub, behind the prefix. No prefix of deltatune is the same function."
        )
    left = configuration.wholes("leave_out") or []
    blocks = list(ground.blocks())
    own = [block for block in blocks if block.order not in left]
    key = f"prefix_tunings.{ground.name}.self_prefix."
    copies = [f"{ground.stem}prefix_tuning.{key}"] + [
        f"{ground.stem}{block.path}.{block.family.attention}.prefix_tuning.pool.{key}"
        for block in blocks
    ]
    length = configuration.count("prefix_length")
    one = _prefix_shapes(configuration, ground.width, length, len(own))
    shapes = {copy + name: shape for copy in copies for name, shape in one.items()}
    for index, block in enumerate(own):
        make = partial(_prefix, copies, tuple(one), length, index)
        method = build("prefix", {"length": length})
        yield Piece(method, f"{block.role}.self_attention", shapes, make, module=False)


def _prefix_shapes(
    configuration: Configuration, width: int, length: int, layers: int
) -> dict[str, tuple[int, ...]]:
    if configuration.flag("flat"):
        return {"control_trans": (length * layers * 2 * width,)}
    middle = configuration.count("bottleneck_size")
    return {
        "wte.weight": (length, width),
        "control_trans.0.weight": (middle, width),
        "control_trans.0.bias": (middle,),
        "control_trans.2.weight": (layers * 2 * width, middle),
        "control_trans.2.bias": (layers * 2 * width,),
    }


def _prefix(
    copies: list[str], names: tuple[str, ...], length: int, index: int, found: Leaves, site: Site
) -> dict[str, Tensor]:
    """K and V of one layer, out of what all have in common."""
    p = {name: found[copies[0] + name] for name in names}
    for copy in copies[1:]:
        for name in names:
            if not torch.equal(found[copy + name], p[name]):
                raise ArtefactError(f"{copy}{name} is not what it is a copy of. Save it anew.")
    if "wte.weight" in p:
        hidden = torch.tanh(
            linear(p["wte.weight"], p["control_trans.0.weight"], p["control_trans.0.bias"])
        )
        made = linear(hidden, p["control_trans.2.weight"], p["control_trans.2.bias"])
    else:
        made = p["control_trans"].view(length, -1)
    parts = torch.unflatten(made, 1, (-1, site.key_width))  # keys and values of all layers
    return {"K": parts[:, 2 * index], "V": parts[:, 2 * index + 1]}


def refts(configuration: Configuration, ground: Ground) -> Iterator[Piece]:
    """The pieces of a ReFT. Raises ArtefactError for what has no counterpart."""
    if ground.kind not in ("bert", "roberta"):
        raise ArtefactError(
            f"{ground.where}: AdapterHub edits the first tokens of every call, so that one which "
            "is generated with a cache is edited, too, and in T5 the decoder's; deltatune edits "
            "the prompt alone. ReFT is read for BERT and RoBERTa."
        )
    if configuration.values["orthogonality"] is not True:
        configuration.refuse(
            "orthogonality",
            "true: AdapterHub writes the same for NoReFT and DiReFT, and reads either as NoReFT",
        )
    first = configuration.count("prefix_positions", zero=True)
    last = configuration.count("suffix_positions", zero=True)
    tied, rank = configuration.flag("tied_weights"), configuration.count("r")
    layers = None if configuration.values["layers"] == "all" else configuration.wholes("layers")
    separate = bool(not tied and first and last)
    fields = {"rank": rank, "first": first, "last": last, "separate": separate, "whole": True}
    method, units = build("reft", fields), 1 if tied else 2
    used = (0, 1) if separate else (0,) if tied or first else (1,)
    for block in ground.blocks():
        if layers is not None and block.order not in layers:
            continue
        holder = f"{ground.stem}{block.path}.reft_layer.refts.{ground.name}.units."
        shapes: dict[str, tuple[int, ...]] = {}
        for unit in range(units):
            shapes |= _unit_shapes(f"{holder}{unit}.", rank, ground.width)
        at = f"{block.role}.residual"
        yield Piece(method, at, shapes, partial(_edits, holder, used), module=False)


def _unit_shapes(start: str, rank: int, width: int) -> Shapes:
    return {
        f"{start}learned_source.weight": (rank, width),
        f"{start}learned_source.bias": (rank,),
        f"{start}projection.parametrizations.weight.original": (rank, width),
        f"{start}projection.parametrizations.weight.0.base": (width, width),
    }


def _edits(holder: str, used: tuple[int, ...], found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    starts = [f"{holder}{unit}." for unit in used]
    return {
        "R": torch.stack([_rotation(start, found) for start in starts]),
        "W": torch.stack([found[f"{start}learned_source.weight"] for start in starts]),
        "b": torch.stack([found[f"{start}learned_source.bias"] for start in starts]),
    }


def _rotation(start: str, found: Leaves) -> Tensor:
    """R as torch's parametrisation makes it, a product of reflections times a base."""
    original = found[f"{start}projection.parametrizations.weight.original"]
    made = nn.Linear(original.shape[1], original.shape[0], bias=False)
    nn.utils.parametrizations.orthogonal(made)
    reflections: Any = made.parametrizations
    held = reflections.weight
    with torch.no_grad():
        held.original.copy_(original)
        held[0].base.copy_(found[f"{start}projection.parametrizations.weight.0.base"])
        rows = made.weight.detach().clone()
    if (rows @ rows.mT - torch.eye(len(rows))).abs().max() > 1e-4:
        raise ArtefactError(
            f"{start}projection is no rotation: torch reads the diagonal of its reflections as "
            "whole numbers, and weight decay has made it none. Train it anew, without."
        )
    return rows
