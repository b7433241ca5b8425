"""Evaluation: a model's answers to the examples of a task, and the scores of answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.evaluation.calibrating import calibration as calibration
    from deltatune.evaluation.predicting import predict as predict
    from deltatune.evaluation.scoring import score as score

_HOMES = {
    "calibration": "deltatune.evaluation.calibrating",
    "predict": "deltatune.evaluation.predicting",
    "score": "deltatune.evaluation.scoring",
}

__all__ = ["calibration", "predict", "score"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltatune.evaluation' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
