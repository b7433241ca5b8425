"""Where rows come from: a local folder, the user's files, the hub, or this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deltatune.tasks.example import Tables
from deltatune.tasks.specification import EmbeddedSpecification, FilesSpecification

if TYPE_CHECKING:
    from deltatune.tasks.task import Task

__all__ = ["DATA_VARIABLE", "Source", "open_source"]

DATA_VARIABLE = "DELTATUNE_DATA"


class Source(Protocol):
    """Something that holds the rows of tasks."""

    def read(self, task: Task) -> Tables:
        """Returns the rows of `task`. Raises DataError if it has none or they cannot be read."""


def open_source(task: Task, data: Source | str | Path | None = None) -> Source:
    """Returns the source to read `task` from.

    Args:
        task: the record. Files named by it and embedded tasks have one source only: `data` is not
            asked.
        data: a source, a folder, the word "hub", or None: the folder of the environment variable
            DELTATUNE_DATA if it holds the task, else what the record names.
    """
    from deltatune.tasks.sources.embedded import EmbeddedSource
    from deltatune.tasks.sources.files import FilesSource
    from deltatune.tasks.sources.folder import FolderSource
    from deltatune.tasks.sources.hub import HubSource

    if data is not None and not isinstance(data, str | Path):
        return data
    specification = task.source
    if isinstance(specification, EmbeddedSpecification):
        return EmbeddedSource(specification.builder)
    if isinstance(specification, FilesSpecification):
        return FilesSource(specification)
    if data is not None and data != "hub":
        return FolderSource(Path(data))
    root = os.environ.get(DATA_VARIABLE)
    if data is None and root and FolderSource(Path(root)).folder_of(task):
        return FolderSource(Path(root))
    return HubSource(specification)
