"""The tables of Table 1 of the delta-tuning paper, as data: tasks, printed scores, manual
templates.

`tasks.csv` says how CrossFit (INK-USC/CrossFit, 2022-04-27) turns each task into text-to-text,
`table1.csv` holds the printed scores of Ding et al. 2023 (Nature Machine Intelligence 5, 220-235),
and `manual_templates.csv` the cloze prompts of its Table 2. `task_id` joins them.
"""

from __future__ import annotations

import csv
import functools
import io
from importlib.resources import files

from deltatune.core.errors import UnknownNameError

__all__ = ["manual_templates", "table1", "task_row", "tasks"]

ReferenceRow = dict[str, str]


def _read(name: str) -> tuple[ReferenceRow, ...]:
    text = (files(__package__) / name).read_text("utf-8")
    return tuple(csv.DictReader(io.StringIO(text)))


@functools.cache
def tasks() -> tuple[ReferenceRow, ...]:
    """Returns the rows of `tasks.csv`: 104 tasks, column name to text."""
    return _read("tasks.csv")


@functools.cache
def table1() -> tuple[ReferenceRow, ...]:
    """Returns the rows of `table1.csv` in the paper's order: 104 tasks and 18 averages."""
    return _read("table1.csv")


@functools.cache
def manual_templates() -> tuple[ReferenceRow, ...]:
    """Returns the rows of `manual_templates.csv`: 49 cloze prompts with their label words."""
    return _read("manual_templates.csv")


def task_row(task_id: str) -> ReferenceRow:
    """Returns the row of `tasks.csv` for `task_id`. Raises UnknownNameError if it has none."""
    by_id = {row["task_id"]: row for row in tasks()}
    if task_id not in by_id:
        raise UnknownNameError("task of Table 1", task_id, by_id)
    return by_id[task_id]
