"""Tasks: records, sources, splits and metrics. Text only: no model, no tensor.

`find_task("glue_rte").load()` returns examples. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.tasks.example import Example as Example
    from deltatune.tasks.example import Splits as Splits
    from deltatune.tasks.records import TASKS as TASKS
    from deltatune.tasks.records import find_task as find_task
    from deltatune.tasks.records import known_tasks as known_tasks
    from deltatune.tasks.sources.files import task_from_files as task_from_files
    from deltatune.tasks.task import Task as Task

_HOMES = {
    "TASKS": "deltatune.tasks.records",
    "Example": "deltatune.tasks.example",
    "Splits": "deltatune.tasks.example",
    "Task": "deltatune.tasks.task",
    "find_task": "deltatune.tasks.records",
    "known_tasks": "deltatune.tasks.records",
    "task_from_files": "deltatune.tasks.sources.files",
}

__all__ = ["TASKS", "Example", "Splits", "Task", "find_task", "known_tasks", "task_from_files"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltatune.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
