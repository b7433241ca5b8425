"""deltatune: train, compare, compose and keep small deltas of frozen language models.

The names below are imported when they are first used, so that `import deltatune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.api import attach, compare, evaluate, load, plan, train
    from deltatune.backbones.load import load_backbone
    from deltatune.core.errors import DeltatuneError
    from deltatune.core.grammar import parse

__version__ = "0.1.0"

__all__ = [
    "DeltatuneError",
    "__version__",
    "attach",
    "compare",
    "evaluate",
    "load",
    "load_backbone",
    "parse",
    "plan",
    "train",
]

_HOMES = {
    "DeltatuneError": "deltatune.core.errors",
    "attach": "deltatune.api",
    "compare": "deltatune.api",
    "evaluate": "deltatune.api",
    "load": "deltatune.api",
    "load_backbone": "deltatune.backbones.load",
    "parse": "deltatune.core.grammar",
    "plan": "deltatune.api",
    "train": "deltatune.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
