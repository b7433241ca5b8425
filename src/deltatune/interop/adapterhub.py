"""AdapterHub's folders, `adapter_config.json` with `adapter.safetensors`: read.

What is read computes what `adapters` 1.2 computes, or is refused. `adapters` itself is not needed.
A folder names its backbone, but holds no fingerprint of it: that the weights are the same cannot be
verified, and `delta.origins` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError
from deltatune.interop.adopting import adopt
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.hub_bottleneck import BOTTLENECK, bottlenecks
from deltatune.interop.dialects.hub_head import heads
from deltatune.interop.dialects.hub_lora import LORA, loras
from deltatune.interop.dialects.hub_places import FAMILIES, Ground
from deltatune.interop.dialects.hub_tokens import PREFIX, REFT, prefixes, refts
from deltatune.interop.folder import CONFIGURATION, Header, read_configuration, told
from deltatune.interop.pickled import header_of
from deltatune.interop.pieces import Piece, Pieces

__all__ = ["holds", "read"]

_SAFE, _PICKLED = "adapter.safetensors", "pytorch_adapter.bin"
_HEAD, _SAFE_HEAD, _PICKLED_HEAD = (
    "head_config.json",
    "model_head.safetensors",
    "pytorch_model_head.bin",
)
_FUSION = "adapter_fusion_config.json"
_LIBRARY = "AdapterHub's adapters 1.2"
_KEYS = Keys(
    read={"config": None, "model_type": None, "name": None, "version": None, "model_class": None},
    idle=frozenset({"hidden_size", "label2id", "model_name"}),
)
_READ: Mapping[str | None, Keys] = {
    None: BOTTLENECK,
    "lora": LORA,
    "prefix_tuning": PREFIX,
    "reft": REFT,
}
_REFUSED: Mapping[str, str] = {
    "prompt_tuning": "AdapterHub puts the prompt behind the positions and the norm of the "
    "embeddings, and a prompt of deltatune is in front of them",
    "mtl_lora": "its calls name a task for each row, and it has a map for each",
}


def holds(folder: str | Path) -> bool:
    """Whether a folder is one of AdapterHub's."""
    place = Path(folder)
    own = any((place / name).is_file() for name in (_SAFE, _PICKLED))
    return (own and (place / CONFIGURATION).is_file()) or (place / _FUSION).is_file()


def read(
    folder: str | Path, model: nn.Module, *, seed: int = 0, allow_pickle: bool = False
) -> Delta:
    """Attaches what a folder of AdapterHub holds to a model.

    Args:
        folder: with `adapter_config.json` and `adapter.safetensors`; a head beside it is read, too.
        model: the backbone that it was made for, of transformers.
        seed: of dropout, in further training.
        allow_pickle: read `pytorch_adapter.bin` where there are no safetensors.

    Returns:
        The delta. `delta.origins[0]` holds the configuration; `save` keeps it among the facts.

    Raises:
        ArtefactError: files are missing or malformed; a key or a value of the configuration has no
            counterpart; a tensor is missing, belongs to nothing or has another shape.
    """
    path = Path(folder)
    if (path / _FUSION).is_file() and not (path / CONFIGURATION).is_file():
        raise ArtefactError(
            f"{path} holds an AdapterFusion, which weighs adapters of other folders by what stands "
            "behind another norm than that of deltatune's adapter_fusion. Load it with AdapterHub."
        )
    values = read_configuration(path, library="AdapterHub")
    with told(path):
        header = _header(path, _SAFE, _PICKLED, allow_pickle)
        ground = _ground(values, str(path / CONFIGURATION), model, header)
        files = {header: list(_pieces(values.get("config"), ground, values["version"]))}
        if (path / _HEAD).is_file():
            head = _header(path, _SAFE_HEAD, _PICKLED_HEAD, allow_pickle)
            files[head] = _head(path, ground)
        found = Pieces.of([piece for own in files.values() for piece in own], model, str(path))
        for one, own in files.items():
            shapes = {name: shape for piece in own for name, shape in piece.shapes.items()}
            one.check(shapes, str(found.expression))
        leaves = found.leaves({name: v for one in files for name, v in one.read().items()})
        return adopt(
            model, found.expression, leaves, library="adapters", configuration=values, seed=seed
        )


def _header(path: Path, safe: str, pickled: str, allow_pickle: bool) -> Header:
    return header_of(path, safe, pickled, allow_pickle=allow_pickle, library="AdapterHub")


def _ground(values: Mapping[str, Any], where: str, model: nn.Module, header: Header) -> Ground:
    """The model as the folder sees it. Raises ArtefactError where it cannot be for this one."""
    top = Configuration(where, values, _KEYS, _LIBRARY)
    kind, name = top.text("model_type"), top.text("name")
    if not re.fullmatch(r"(adapters\.|\d).{0,30}", top.text("version")):
        top.refuse("version", "that of adapters or adapter-transformers")
    if kind == "llama":
        raise ArtefactError(
            f"{where}: adapters 1.2 computes another Llama than transformers, before anything is "
            "added: its attention turns heads and tokens twice. Nothing here is the same function."
        )
    if kind not in FAMILIES:
        raise ArtefactError(
            f"{where}: deltatune does not know where AdapterHub puts what it adds to "
            f"{kind[:80]!r}; it reads {', '.join(sorted(FAMILIES))}."
        )
    own = getattr(getattr(model, "config", None), "model_type", None)
    if own != kind:
        top.refuse("model_type", f"{own!r}, as the model's is. Load the backbone it was made for")
    base = f"{model.base_model_prefix}."
    root = base if hasattr(model, base[:-1]) else ""
    stem = base if any(one.startswith(base) for one in header.shapes) else ""
    return Ground(model, kind, root, stem, name, where, frozenset(header.shapes))


def _pieces(values: object, ground: Ground, version: str) -> Iterator[Piece]:
    """The pieces of a configuration, or of each of a union. Raises ArtefactError."""
    if not isinstance(values, dict):
        raise ArtefactError(
            f"{ground.where}: config must be a configuration; it is {values!r:.80}."
        )
    kind = values.get("architecture")
    if kind == "union" and set(values) == {"architecture", "configs"}:
        members = values["configs"] if isinstance(values["configs"], list) else []
        for one in members:
            if not isinstance(one, dict) or one.get("architecture") == "union":
                raise ArtefactError(f"{ground.where}: a member of the union is no configuration.")
            yield from _pieces(one, ground, version)
        return
    if not isinstance(kind, str | None) or kind not in (_READ.keys() | _REFUSED.keys()):
        raise ArtefactError(f"{ground.where}: {str(kind)[:80]!r} is no architecture of {_LIBRARY}.")
    if kind is not None and kind in _REFUSED:
        raise ArtefactError(f"{ground.where}: {kind} is not read: {_REFUSED[kind]}.")
    keys = _READ[kind]
    configuration = Configuration(ground.where, values, keys, _LIBRARY)
    if keys is BOTTLENECK:
        yield from bottlenecks(configuration, ground)
    elif keys is LORA:
        yield from loras(configuration, ground, version)
    else:
        yield from (prefixes if keys is PREFIX else refts)(configuration, ground)


def _head(path: Path, ground: Ground) -> list[Piece]:
    where = str(path / _HEAD)
    values = read_configuration(path, _HEAD, "AdapterHub")
    top = Configuration(where, values, _KEYS, _LIBRARY)
    return list(heads(top.values["config"], replace(ground, name=top.text("name")), where))
