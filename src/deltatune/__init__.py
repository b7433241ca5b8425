"""deltatune: train, compare, compose and keep small deltas of frozen language models.

The names below are imported when they are first used, so that `import deltatune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.api import (
        attach,
        compare,
        evaluate,
        load,
        plan,
        route,
        save,
        train,
        train_many,
    )
    from deltatune.backbones.load import load_backbone
    from deltatune.core.delta import Delta
    from deltatune.core.errors import DeltatuneError
    from deltatune.core.grammar import parse
    from deltatune.core.run import Run
    from deltatune.core.status import status
    from deltatune.core.swap import swap
    from deltatune.study.cell import Cell
    from deltatune.study.comparison import Comparison
    from deltatune.training.budget import Epochs, Seconds, Steps, Tokens
    from deltatune.training.loop import fit
    from deltatune.training.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "Comparison",
    "Delta",
    "DeltatuneError",
    "Epochs",
    "Run",
    "Seconds",
    "Settings",
    "Steps",
    "Tokens",
    "__version__",
    "attach",
    "compare",
    "evaluate",
    "fit",
    "load",
    "load_backbone",
    "parse",
    "plan",
    "route",
    "save",
    "status",
    "swap",
    "train",
    "train_many",
]

_HOMES = {
    "Cell": "deltatune.study.cell",
    "Comparison": "deltatune.study.comparison",
    "Delta": "deltatune.core.delta",
    "DeltatuneError": "deltatune.core.errors",
    "Epochs": "deltatune.training.budget",
    "Run": "deltatune.core.run",
    "Seconds": "deltatune.training.budget",
    "Settings": "deltatune.training.settings",
    "Steps": "deltatune.training.budget",
    "Tokens": "deltatune.training.budget",
    "attach": "deltatune.api",
    "compare": "deltatune.api",
    "evaluate": "deltatune.api",
    "fit": "deltatune.training.loop",
    "load": "deltatune.api",
    "load_backbone": "deltatune.backbones.load",
    "parse": "deltatune.core.grammar",
    "plan": "deltatune.api",
    "route": "deltatune.api",
    "save": "deltatune.api",
    "status": "deltatune.core.status",
    "swap": "deltatune.core.swap",
    "train": "deltatune.api",
    "train_many": "deltatune.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
