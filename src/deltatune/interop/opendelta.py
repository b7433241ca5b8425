"""OpenDelta's folders, `config.json` with `pytorch_model.bin`: read.

OpenDelta writes pickles alone, so that each must be asked for. What is read computes what OpenDelta
0.3.2 computes, or is refused; OpenDelta itself is not needed. Its hash of the backbone is that of
its own description of it, and is not held to anything: `delta.origins` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError
from deltatune.interop.adopting import adopt
from deltatune.interop.configuration import Configuration
from deltatune.interop.dialects.open_kinds import COMMON, KINDS, Kind
from deltatune.interop.dialects.open_tokens import TOKENS, unfrozen
from deltatune.interop.folder import read_configuration, told
from deltatune.interop.pickled import header_of
from deltatune.interop.pieces import Pieces

__all__ = ["holds", "read"]

_CONFIGURATION, _PICKLED = "config.json", "pytorch_model.bin"
_LIBRARY = "OpenDelta"
_EVERY: Mapping[str, Kind] = {**KINDS, **TOKENS}


def holds(folder: str | Path) -> bool:
    """Whether a folder is one of OpenDelta's, and none of a whole model of transformers."""
    place = Path(folder)
    if not ((place / _CONFIGURATION).is_file() and (place / _PICKLED).is_file()):
        return False
    try:
        return "delta_type" in read_configuration(place, _CONFIGURATION, _LIBRARY)
    except ArtefactError:
        return False


def read(
    folder: str | Path, model: nn.Module, *, seed: int = 0, allow_pickle: bool = False
) -> Delta:
    """Attaches what a folder of OpenDelta holds to a model.

    Args:
        folder: with `config.json` and `pytorch_model.bin`, as `save_finetuned` writes them behind
            `freeze_module`.
        model: the backbone that it was made for, before OpenDelta changed it.
        seed: of dropout, in further training.
        allow_pickle: read the pickle, all that OpenDelta writes.

    Returns:
        The delta. `delta.origins[0]` holds the configuration; `save` keeps it among the facts.

    Raises:
        ArtefactError: files are missing or malformed; the pickle is not allowed; a key or a value
            of the configuration has no counterpart; a tensor is missing, belongs to nothing or has
            another shape.
    """
    path = Path(folder)
    where = str(path / _CONFIGURATION)
    values = read_configuration(path, _CONFIGURATION, _LIBRARY)
    with told(path):
        kind = values.get("delta_type")
        if not isinstance(kind, str) or kind not in _EVERY:
            raise ArtefactError(
                f"{where}: {str(kind)[:80]!r} is no delta_type of OpenDelta that deltatune reads: "
                f"{', '.join(sorted(_EVERY))}."
            )
        keys, pieces_of = _EVERY[kind]
        configuration = Configuration(where, values, COMMON | keys, _LIBRARY)
        header = header_of(path, "", _PICKLED, allow_pickle=allow_pickle, library=_LIBRARY)
        own = [*pieces_of(configuration, model)]
        found = Pieces.of([*own, *unfrozen(configuration, model)] if own else own, model, where)
        header.check(found.shapes, str(found.expression))
        leaves = found.leaves(header.read())
        return adopt(
            model, found.expression, leaves, library="opendelta", configuration=values, seed=seed
        )
