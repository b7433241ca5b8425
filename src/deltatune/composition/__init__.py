"""Composition of trained deltas: arithmetic, averages, and searches without gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.composition.arithmetic import average as average
    from deltatune.composition.arithmetic import dare as dare
    from deltatune.composition.arithmetic import ties as ties
    from deltatune.composition.averaging import mera as mera
    from deltatune.composition.averaging import soup as soup
    from deltatune.composition.averaging import soup_by_score as soup_by_score
    from deltatune.composition.change import Change as Change
    from deltatune.composition.change import add as add
    from deltatune.composition.change import effective as effective
    from deltatune.composition.compress import Composed as Composed
    from deltatune.composition.compress import as_delta as as_delta
    from deltatune.composition.likeness import nearest as nearest
    from deltatune.composition.likeness import similarity as similarity
    from deltatune.composition.likeness import stored_similarity as stored_similarity
    from deltatune.composition.prompt_search import blackbox as blackbox
    from deltatune.composition.prompt_search import in_slots as in_slots
    from deltatune.composition.prompt_search import prompt_of as prompt_of
    from deltatune.composition.prompt_search import write_prompt as write_prompt
    from deltatune.composition.weight_search import lorahub as lorahub

_HOMES = {
    "Change": "change",
    "Composed": "compress",
    "add": "change",
    "as_delta": "compress",
    "average": "arithmetic",
    "blackbox": "prompt_search",
    "dare": "arithmetic",
    "effective": "change",
    "in_slots": "prompt_search",
    "lorahub": "weight_search",
    "mera": "averaging",
    "nearest": "likeness",
    "similarity": "likeness",
    "stored_similarity": "likeness",
    "soup": "averaging",
    "soup_by_score": "averaging",
    "ties": "arithmetic",
    "prompt_of": "prompt_search",
    "write_prompt": "prompt_search",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltatune.composition' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"deltatune.composition.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
