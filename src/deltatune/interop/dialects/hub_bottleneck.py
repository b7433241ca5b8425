"""AdapterHub's bottlenecks: behind a sublayer or beside it, dense or hypercomplex; and invertible.

Where a bottleneck stands, and which residual and norm follow, three switches say together. What
they make of the output h of a sublayer, its residual x and, in post-norm models, its norm LN is a
bottleneck at one place of ours, or none is: then it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from deltatune.core.grammar import build
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.hub_places import Block, Ground, Spot
from deltatune.interop.pieces import Piece

__all__ = ["ACTIVATIONS", "BOTTLENECK", "bottlenecks"]

ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "identity",
}  #: names of transformers to ours

BOTTLENECK = Keys(
    read={
        "architecture": None,
        "mh_adapter": None,
        "output_adapter": None,
        "cross_adapter": False,
        "reduction_factor": None,
        "non_linearity": None,
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": False,
        "scaling": 1.0,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "leave_out": None,
        "phm_layer": False,
        "phm_dim": 4,
        "phm_rank": 1,
        "phm_bias": True,
    },
    only={
        "ln_before": (False,),
        "ln_after": (False,),
        "use_gating": (False,),
        "factorized_phm_W": (True,),
        "shared_W_phm": (False,),
        "shared_phm_rule": (True,),
        "factorized_phm_rule": (False,),
    },
    idle=frozenset({"adapter_residual_before_ln", "dropout", "hypercomplex_nonlinearity"})
    | frozenset({"init_weights", "init_weights_seed", "learn_phm", "phm_c_init"})
    | frozenset({"phm_init_range", "stochastic_depth"}),
)  #: of `BnConfig`; a norm of the adapter's own and gates have no counterpart


def bottlenecks(configuration: Configuration, ground: Ground) -> Iterator[Piece]:
    """The pieces of a bottleneck. Raises ArtefactError for what has no counterpart."""
    _check(configuration)
    left = configuration.wholes("leave_out") or []
    for block in ground.blocks():
        for key, spot in block.family.spots.items():
            if configuration.flag(key) and block.order not in left:
                width = _width(configuration, ground, block)
                yield _piece(configuration, ground, block, spot, width)
    if configuration.values["inv_adapter"] is not None:
        yield _invertible(configuration, ground)


def _check(configuration: Configuration) -> None:
    if configuration.flag("is_parallel") and configuration.flag("phm_layer"):
        configuration.refuse("is_parallel", "false with phm_layer: compacter reads what it adds to")
    for key in ("original_ln_before", "original_ln_after"):
        configuration.flag(key)


def _activation(configuration: Configuration) -> str:
    name = configuration.text("non_linearity").lower()
    if name not in ACTIVATIONS:
        configuration.refuse("non_linearity", f"one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _factor(configuration: Configuration, key: str, value: object) -> float:
    if type(value) not in (int, float) or not 1e-6 < value < 1e6:  # type: ignore[operator]
        configuration.refuse(key, "a positive number")
    return float(value)  # type: ignore[arg-type]


def _width(configuration: Configuration, ground: Ground, block: Block) -> int:
    """The bottleneck of one block."""
    factor: Any = configuration.values["reduction_factor"]
    if isinstance(factor, dict):
        factor = factor.get(str(block.order), factor.get("default"))
    return max(1, int(ground.width // _factor(configuration, "reduction_factor", factor)))


def _place(configuration: Configuration, ground: Ground, block: Block, spot: Spot) -> str:
    """The place of a bottleneck; a role with a dot in front of it.

    With `before` the bottleneck reads what follows the residual, with `after` the residual follows
    the bottleneck. `own` is the residual around it: h where it is true.
    """
    before = configuration.flag("original_ln_before")
    after = configuration.flag("original_ln_after")
    own = configuration.values["residual_before_ln"]
    start = f"{ground.root}{block.path}."
    if configuration.flag("is_parallel"):
        if not after:
            configuration.refuse("original_ln_after", "true beside a sublayer")
        if not spot.norm:
            configuration.refuse(
                "is_parallel",
                "false where norms stand in front of sublayers: AdapterHub's reads the stream in "
                "front of the norm, and parallel behind it",
            )
        return f".{block.role}.{spot.sublayer}"
    if after and not before and own in (True, False):
        return start + spot.last
    if spot.norm and before and not after and own is False:
        return start + spot.norm
    if spot.norm and before and after and own is True and not configuration.flag("phm_layer"):
        return start + spot.norm  # LN(h + x + BN(LN(h + x)))
    if spot.norm:
        configuration.refuse(
            "original_ln_before",
            f"such in {ground.kind} that the residual is added once. Where both norms are run, of "
            "the dense ones alone: AdapterHub runs that of the backbone twice, and no compacter of "
            "deltatune does",
        )
    if before and own is after:  # h + x + BN(h + x), whichever of the two adds x
        if spot.ends:
            return f".{block.role}.residual"
        configuration.refuse(
            "original_ln_before",
            "false for an adapter behind the attention: it reads the stream between two "
            "sublayers, where no module gives it",
        )
    configuration.refuse("residual_before_ln", "such that the residual is added once")


def _piece(
    configuration: Configuration, ground: Ground, block: Block, spot: Spot, width: int
) -> Piece:
    at = _place(configuration, ground, block, spot)
    holder = f"{ground.stem}{block.path}.{spot.holder}adapters.{ground.name}."
    scaling, d = configuration.values["scaling"], ground.width
    shapes: dict[str, tuple[int, ...]] = {}
    if scaling in ("learned", "channel"):
        shapes[f"{holder}scaling"] = (1,) if scaling == "learned" else (d,)
    elif type(scaling) is not float:
        configuration.refuse("scaling", 'a number with a point, "learned" or "channel"')
    fields = {"bottleneck": width, "activation": _activation(configuration)}
    if configuration.flag("phm_layer"):
        return _hypercomplex(configuration, ground, holder, at, shapes, fields)
    shapes |= {
        f"{holder}adapter_down.0.weight": (width, d),
        f"{holder}adapter_down.0.bias": (width,),
        f"{holder}adapter_up.weight": (d, width),
        f"{holder}adapter_up.bias": (d,),
    }
    parallel, fixed = configuration.flag("is_parallel"), type(scaling) is float
    method: Method = build("adapter" if not at.endswith("residual") else "pfeiffer", fields)
    if spot.norm and at.endswith(spot.norm) and configuration.flag("original_ln_after"):
        norm: Any = ground.model.get_submodule(at)
        method = build("pfeiffer", {**fields, "twice": True, "eps": norm.eps})
    if parallel:
        method = build("parallel", {**fields, "scale": scaling if fixed else 1.0})
    make = partial(_dense, holder, scaling if fixed and not parallel else 1.0)
    return Piece(method, at.removeprefix("."), shapes, make, module=not at.startswith("."))


def _scale(found: Leaves, holder: str, constant: float) -> Tensor | float:
    """What multiplies the bottleneck: [1] or [d] where it is learned."""
    return found.get(f"{holder}scaling", constant)


def _dense(holder: str, constant: float, found: Leaves, site: Site) -> dict[str, Tensor]:
    """D, c and, multiplied by the scale, U and e."""
    del site
    scale = _scale(found, holder, constant)
    up = found[f"{holder}adapter_up.weight"]
    return {
        "D": found[f"{holder}adapter_down.0.weight"],
        "c": found[f"{holder}adapter_down.0.bias"],
        "U": (scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale) * up,
        "e": scale * found[f"{holder}adapter_up.bias"],
    }


def _hypercomplex(
    configuration: Configuration,
    ground: Ground,
    holder: str,
    at: str,
    shapes: dict[str, tuple[int, ...]],
    fields: Mapping[str, Any],
) -> Piece:
    n, r = configuration.whole("phm_dim"), configuration.whole("phm_rank")
    if not 0 < n < 2**16 or not 0 < r < 2**16:
        configuration.refuse("phm_dim", "a positive number, and phm_rank, too")
    if configuration.values["scaling"] == "channel":
        configuration.refuse("scaling", 'a number or "learned" with phm_layer')
    bias = configuration.flag("phm_bias")
    m, d = fields["bottleneck"], ground.width
    rule = ground.shared("phm_rule")
    shapes = {**shapes, rule: (n, n, n)}
    for part, into, out in (("adapter_down.0.", d, m), ("adapter_up.", m, d)):
        shapes[f"{holder}{part}W_left"] = (n, into // n, r)
        shapes[f"{holder}{part}W_right"] = (n, r, out // n)
        if bias:
            shapes[f"{holder}{part}b"] = (out,)
    method = build("compacter", {**fields, "terms": n, "rank": r, "bias": bias})
    constant = configuration.values["scaling"]
    make = partial(_kronecker, holder, rule, 1.0 if constant == "learned" else constant)
    return Piece(method, at.removeprefix("."), shapes, make, module=not at.startswith("."))


def _kronecker(
    holder: str, rule: str, constant: float, found: Leaves, site: Site
) -> dict[str, Tensor]:
    """AdapterHub multiplies rows by the matrix, we by its transpose, all factors of it turned."""
    del site
    scale = _scale(found, holder, constant)
    made = {"rule": found[rule].mT}
    for name, part, times in (("down", "adapter_down.0.", 1.0), ("up", "adapter_up.", scale)):
        made[f"{name}_s"] = times * found[f"{holder}{part}W_right"].mT
        made[f"{name}_t"] = found[f"{holder}{part}W_left"].mT
    if f"{holder}adapter_up.b" in found:
        made["c"] = found[f"{holder}adapter_down.0.b"]
        made["e"] = scale * found[f"{holder}adapter_up.b"]
    return made


def _invertible(configuration: Configuration, ground: Ground) -> Piece:
    """AdapterHub's own classes for language models undo it in front of the head, others do not."""
    if configuration.values["inv_adapter"] != "nice":
        configuration.refuse("inv_adapter", 'null or "nice"; AdapterHub\'s glow fails on text')
    factor = configuration.values["inv_adapter_reduction_factor"]
    half = ground.width // 2
    width = int(half // _factor(configuration, "inv_adapter_reduction_factor", factor))
    holder = f"{ground.stem}{'encoder.' if ground.kind == 't5' else ''}invertible_adapters."
    shapes: dict[str, tuple[int, ...]] = {}
    for key in "FG":
        start = f"{holder}{ground.name}.{key}."
        shapes |= {f"{start}0.weight": (width, half), f"{start}0.bias": (width,)}
        shapes |= {f"{start}2.weight": (half, width), f"{start}2.bias": (half,)}
    method = build("invertible", {"bottleneck": width, "activation": _activation(configuration)})
    block = next(ground.blocks())
    make = partial(_coupled, f"{holder}{ground.name}.")
    return Piece(method, f"{block.role}.residual", shapes, make, module=False)


def _coupled(holder: str, found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    ends = {"D": "0.weight", "c": "0.bias", "U": "2.weight", "e": "2.bias"}
    return {f"{k}.{leaf}": found[f"{holder}{k}.{end}"] for k in "FG" for leaf, end in ends.items()}
