"""Training: one explicit loop, resumable to the bit.

`fit` trains a run under `Settings` for a budget (`Steps`, `Epochs`, `Seconds`, `Tokens`) and
returns measured facts. Settings and budgets import without torch; the rest is imported when first
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltatune.training.budget import Budget, Epochs, Seconds, Spent, Steps, Tokens, parse
from deltatune.training.settings import Settings

if TYPE_CHECKING:
    from deltatune.training.loop import fit
    from deltatune.training.mixture import Mixture
    from deltatune.training.progress import Progress, choose_progress
    from deltatune.training.state import Evaluation, Result
    from deltatune.training.surveying import survey
    from deltatune.training.tasks import fit_tasks
    from deltatune.training.trainable import Trainable
    from deltatune.training.trunk_cache import TrunkCache

__all__ = [
    "Budget",
    "Epochs",
    "Evaluation",
    "Job",
    "Mixture",
    "Progress",
    "Result",
    "Seconds",
    "Settings",
    "Spent",
    "Steps",
    "Tokens",
    "Trainable",
    "TrunkCache",
    "choose_progress",
    "fit",
    "fit_many",
    "fit_tasks",
    "parse",
    "survey",
]

_HOMES = {
    "Evaluation": "state",
    "Mixture": "mixture",
    "Progress": "progress",
    "Result": "state",
    "Trainable": "trainable",
    "TrunkCache": "trunk_cache",
    "choose_progress": "progress",
    "Job": "many",
    "fit": "loop",
    "fit_many": "many",
    "fit_tasks": "tasks",
    "survey": "surveying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
