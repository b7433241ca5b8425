"""AdapterHub's classifier beside an adapter, where the backbone's own is built alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from deltatune.core.errors import ArtefactError
from deltatune.core.grammar import build
from deltatune.core.method import Leaves
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.hub_places import Ground
from deltatune.interop.pieces import Piece

__all__ = ["HEAD", "heads"]

HEAD = Keys(
    read={"head_type": None, "num_labels": None},
    only={
        "activation_function": ("tanh",),
        "bias": (True,),
        "layers": (2,),
        "use_pooler": (False,),
    },
    idle=frozenset({"dropout_prob", "label2id"}),
)  #: of a classification head: as the first token is read, tanh between two linear maps
_TWO: Mapping[str, tuple[str, str]] = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}  # the modules of the backbone that compute the same


def heads(values: object, ground: Ground, where: str) -> Iterator[Piece]:
    """The pieces of a head from its configuration. Raises ArtefactError for another kind."""
    if not isinstance(values, Mapping) or values.get("head_type") != "classification":
        kind: Any = values.get("head_type") if isinstance(values, Mapping) else values
        raise ArtefactError(
            f"{where}: head_type={str(kind)[:80]!r} has no counterpart; deltatune reads "
            "'classification'. Save the adapter alone: save_adapter(..., with_head=False)."
        )
    configuration = Configuration(where, values, HEAD, "AdapterHub's adapters 1.2")
    known = dict(ground.model.named_modules())
    inner, outer = _TWO.get(ground.kind, ("", ""))
    if inner not in known or outer not in known:
        raise ArtefactError(
            f"{where}: {type(ground.model).__name__} has no classifier of two linear maps with "
            "tanh between them, behind the first token. Load BERT or RoBERTa for the "
            "classification of texts."
        )
    labels, d = configuration.whole("num_labels"), ground.width
    found = storage_of(known[outer]).widths(known[outer])[1]
    if labels != found:
        configuration.refuse("num_labels", f"{found}, as many as the backbone's classifier has")
    start = f"heads.{ground.name}."
    for at, key, outputs in ((inner, "1.", d), (outer, "4.", labels)):
        method = build("last_layer", {}) if at == inner else build("head", {"labels": labels})
        shapes = {f"{start}{key}weight": (outputs, d), f"{start}{key}bias": (outputs,)}
        yield Piece(method, at, shapes, partial(_linear, f"{start}{key}"))


def _linear(start: str, found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    return {"weight": found[f"{start}weight"], "bias": found[f"{start}bias"]}
