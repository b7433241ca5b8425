"""OpenDelta's prefixes and soft prompts, and what a folder has beside its kind: whole modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltatune.core.errors import ArtefactError, TargetError
from deltatune.core.grammar import build
from deltatune.core.method import METHODS, Leaves
from deltatune.core.roles import places
from deltatune.core.site import Site
from deltatune.core.target import find_sites
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.open_kinds import Kind
from deltatune.interop.dialects.open_places import named_modules
from deltatune.interop.pieces import Piece

__all__ = ["TOKENS", "unfrozen"]

_READ = ("bert", "roberta", "gpt2")


def _prefix(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _READ:
        raise ArtefactError(
            f"{configuration.where}: a prefix of OpenDelta is read for {', '.join(_READ)}. With "
            "relative positions (T5) it has positions of its own, which none of deltatune has."
        )
    length, key = configuration.count("prefix_token_num"), "modified_modules"
    roles = {
        place.module.rpartition(".")[0]: f"{place.stack}.block[{place.block}].{place.sublayer}"
        for place in places(model)
        if place.part in ("q", "output") and place.block is not None
    }  # by the module that holds the projections, and for BERT by the one around it
    roles |= {path.removesuffix(".self"): role for path, role in roles.items()}
    paths = named_modules(configuration, key, configuration.texts(key), model)
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    made = configuration.flag("reparameterize")
    for index, path in enumerate(paths):
        if path not in roles:
            configuration.refuse(key, f"attentions; {path} is none")
        if made:
            shapes = _network(configuration, f"{paths[0]}.reparams.", length, width, len(paths))
            make: Any = partial(_computed, f"{paths[0]}.reparams.", index, width)
        else:
            start = f"{path}.prefix."
            shapes = {f"{start}past_key": (length, width), f"{start}past_value": (length, width)}
            make = partial(_stored, start)
        method = build("prefix", {"length": length})
        yield Piece(method, roles[path], shapes, make, module=False)


def _network(
    configuration: Configuration, start: str, length: int, width: int, layers: int
) -> dict[str, tuple[int, ...]]:
    embedding, middle = configuration.count("embed_dim"), configuration.count("mid_dim")
    return {
        f"{start}wte.weight": (length, embedding),
        f"{start}control_trans.0.weight": (middle, embedding),
        f"{start}control_trans.0.bias": (middle,),
        f"{start}control_trans.2.weight": (2 * layers * width, middle),
        f"{start}control_trans.2.bias": (2 * layers * width,),
    }


def _computed(
    start: str, index: int, width: int, found: Leaves, site: Site
) -> Mapping[str, Tensor]:
    del site
    p = {name.removeprefix(start): value for name, value in found.items()}
    hidden = torch.tanh(
        linear(p["wte.weight"], p["control_trans.0.weight"], p["control_trans.0.bias"])
    )
    made = linear(hidden, p["control_trans.2.weight"], p["control_trans.2.bias"])
    parts = torch.unflatten(made, 1, (-1, width))
    return {"K": parts[:, 2 * index], "V": parts[:, 2 * index + 1]}


def _stored(start: str, found: Leaves, site: Site) -> Mapping[str, Tensor]:
    del site
    return {"K": found[f"{start}past_key"], "V": found[f"{start}past_value"]}


def _prompt(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates():
        raise ArtefactError(
            f"{configuration.where}: a classifier of OpenDelta's reads the first token of the soft "
            "prompt, of deltatune's that of the text."
        )
    length = configuration.count("soft_token_num")
    crossing = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    name = f"{'encoder.' if crossing else ''}soft_prompt_layer.soft_embeds"
    width: int = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    method = build("prompt", {"length": length})
    yield Piece(
        method, "embedding", {name: (length, width)}, partial(_embedded, name), module=False
    )


def _embedded(name: str, found: Leaves, site: Site) -> Mapping[str, Tensor]:
    del site
    return {"P": found[name]}


TOKENS: Mapping[str, Kind] = {
    "prefix": (
        Keys(
            read={
                "prefix_token_num": 6,
                "reparameterize": True,
                "embed_dim": 512,
                "mid_dim": 512,
            }
        ),
        _prefix,
    ),
    "soft_prompt": (
        Keys(
            read={"soft_token_num": 100},
            idle=frozenset({"init_range", "token_init", "other_expand_ids"}),
        ),
        _prompt,
    ),
}  #: `delta_type` to its keys, and to what it has on a model


def unfrozen(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    """The modules that were trained beside the kind: the classifier a head, all else values."""
    key = "unfrozen_modules"
    terms = [term for term in configuration.texts(key) if term != "deltas"]
    paths: dict[str, None] = {}
    for path in named_modules(configuration, key, terms, model):
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if any(value is not None for value in module._parameters.values()):
                paths[name] = None
    try:
        heads = METHODS["head"]().choose(find_sites(model, "head", "weight"))
    except TargetError:
        heads = ()
    labels = {site.path: site.outputs for site in heads if site.rows is None}
    for path in paths:
        held = model.get_submodule(path)._parameters
        shapes = {f"{path}.{n}": tuple(v.shape) for n, v in held.items() if v is not None}
        head = path in labels
        method = build("head", {"labels": labels[path]}) if head else build("last_layer", {})
        yield Piece(method, path, shapes, partial(_whole, path, tuple(shapes), head))


def _whole(
    path: str, names: tuple[str, ...], head: bool, found: Leaves, site: Site
) -> Mapping[str, Tensor]:
    made = {name.removeprefix(f"{path}."): found[name] for name in names}
    return {"bias": torch.zeros(site.outputs), **made} if head else made
