"""AdapterHub's LoRA, (IA)³ and VeRA, which are one configuration there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from deltatune.core.grammar import build
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.hub_places import Ground
from deltatune.interop.pieces import Piece

__all__ = ["LORA", "loras"]

LORA = Keys(
    read={
        "architecture": "lora",
        "selfattn_lora": True,
        "intermediate_lora": False,
        "output_lora": False,
        "leave_out": None,
        "r": 8,
        "alpha": 8,
        "attn_matrices": ["q", "v"],
        "composition_mode": "add",
        "dropout": 0.0,
        "vera_b": None,
        "vera_d": None,
    },
    only={"use_gating": (False,)},
    idle=frozenset({"dtype", "init_weights", "init_weights_seed"}),
)  #: of `LoRAConfig`
_REPAIRED = (1, 1)  # before it a LoRA was trained without its scale, and AdapterHub reads it so


def loras(configuration: Configuration, ground: Ground, version: str) -> Iterator[Piece]:
    """The pieces of a LoRA, (IA)³ or VeRA. Raises ArtefactError for what has no counterpart."""
    parts = configuration.texts("attn_matrices")
    if not set(parts) <= {"q", "k", "v"}:
        configuration.refuse("attn_matrices", 'of "q", "k" and "v"')
    asked = {part for part in parts if configuration.flag("selfattn_lora")}
    asked |= {"intermediate"} if configuration.flag("intermediate_lora") else set()
    asked |= {"output"} if configuration.flag("output_lora") else set()
    left = configuration.wholes("leave_out") or []
    for block in ground.blocks():
        for path, part in block.family.loras.items():
            whole = f"{ground.root}{block.path}.{path}"
            named = asked & set("qkv") if part == "qkv" else asked & {part}
            if not named or block.order in left or not _holds(ground, whole, block.path, path):
                continue
            holder = f"{ground.stem}{block.path}.{path}.loras.{ground.name}."
            if part == "qkv":
                role = f"{block.role}.self_attention"
                ordered = [one for one in "qkv" if one in named]
                yield from _fused(configuration, ground, holder, whole, role, ordered, version)
            else:
                yield _piece(configuration, ground, holder, whole, version)


def _holds(ground: Ground, whole: str, block: str, path: str) -> bool:
    """Whether the projection is there; of T5's two inner ones AdapterHub takes the second."""
    names = dict(ground.model.named_modules())
    if path.endswith(".wi") and f"{ground.root}{block}.{path}_1" in names:
        return False
    return whole in names


def _method(configuration: Configuration, version: str) -> Method:
    """LoRA; VeRA, too, whose two vectors AdapterHub trains as whole matrices."""
    rank, alpha = configuration.count("r"), configuration.number("alpha")
    number = re.match(r"adapters\.(\d+)\.(\d+)", version)
    if number and tuple(map(int, number.groups())) < _REPAIRED:
        alpha = float(rank)
    dropout = configuration.number("dropout")
    return build("lora", {"rank": rank, "alpha": alpha, "dropout": dropout})


def _scales(configuration: Configuration) -> bool:
    """Whether it is (IA)³."""
    mode = configuration.values["composition_mode"]
    if mode not in ("add", "scale"):
        configuration.refuse("composition_mode", '"add" or "scale"')
    if mode == "scale" and configuration.whole("r") != 1:
        configuration.refuse("r", "1 with composition_mode scale")
    return bool(mode == "scale")


def _piece(
    configuration: Configuration, ground: Ground, holder: str, path: str, version: str
) -> Piece:
    module = ground.model.get_submodule(path)
    inputs, outputs = storage_of(module).widths(module)
    if _scales(configuration):
        scale = configuration.number("alpha")
        method = build("ia3", {"side": "output"})
        return Piece(method, path, {f"{holder}lora_B": (outputs, 1)}, partial(_gain, holder, scale))
    rank, method = configuration.count("r"), _method(configuration, version)
    if configuration.values["vera_d"] is None and configuration.values["vera_b"] is None:
        shapes = {f"{holder}lora_A": (rank, inputs), f"{holder}lora_B": (outputs, rank)}
        return Piece(method, path, shapes, partial(_factors, holder))
    shared = {leaf: ground.shared(f"lora_{leaf}") for leaf in "AB"}
    shapes = {
        f"{holder}vera_D": (rank, rank),
        f"{holder}vera_B": (outputs, outputs),
        shared["A"]: (rank, inputs),
        shared["B"]: (outputs, rank),
    }
    return Piece(method, path, shapes, partial(_vera, holder, shared))


def _factors(holder: str, found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    return {"A": found[f"{holder}lora_A"], "B": found[f"{holder}lora_B"]}


def _gain(holder: str, scale: float, found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    return {"out": scale * found[f"{holder}lora_B"].flatten()}


def _vera(holder: str, shared: Mapping[str, str], found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    return {
        "A": found[f"{holder}vera_D"] @ found[shared["A"]],
        "B": found[f"{holder}vera_B"] @ found[shared["B"]],
    }


def _fused(
    configuration: Configuration,
    ground: Ground,
    holder: str,
    path: str,
    role: str,
    parts: list[str],
    version: str,
) -> Iterator[Piece]:
    """One fused projection: the factors of its parts lie below each other."""
    if configuration.values["vera_d"] is not None or configuration.values["vera_b"] is not None:
        configuration.refuse("vera_d", "null at a fused projection, where AdapterHub has no VeRA")
    module = ground.model.get_submodule(path)
    inputs, outputs = storage_of(module).widths(module)
    rank, count, scales = configuration.count("r"), len(parts), _scales(configuration)
    shapes = {f"{holder}lora_B": (outputs // 3 * count, rank)}
    if not scales:
        shapes[f"{holder}lora_A"] = (rank * count, inputs)
    elif configuration.number("alpha") != 1:
        configuration.refuse("alpha", "1 at a fused projection, all of which it multiplies")
    method = build("ia3", {"side": "output"}) if scales else _method(configuration, version)
    for index, part in enumerate(parts):
        make = partial(_slice, holder, index, count)
        yield Piece(method, f"{role}.{part}", shapes, make, module=False)


def _slice(holder: str, index: int, count: int, found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    B = found[f"{holder}lora_B"].chunk(count)[index]
    if f"{holder}lora_A" not in found:
        return {"out": B.flatten()}
    return {"A": found[f"{holder}lora_A"].chunk(count)[index], "B": B}
