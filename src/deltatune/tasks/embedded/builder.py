"""What a builder of rows is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.tasks.example import SplitName

__all__ = ["SIZES", "Builder", "Built"]

Built = Mapping[SplitName, Sequence[Mapping[str, Any]]]

SIZES: Mapping[SplitName, int] = {"train": 4000, "validation": 500, "test": 500}
"""Most rows of each split."""


@dataclass(frozen=True)
class Builder:
    """A way to build the rows of an embedded task.

    Attributes:
        version: raised with every change of the rows that are built from the same libraries.
        made_from: names the libraries, with versions, that the rows depend on.
        build: makes the rows of each split.
    """

    version: int
    made_from: Callable[[], str]
    build: Callable[[], Built]
