"""The libraries of the extras `study`, `search` and `cluster`, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from deltatune.core.errors import UnsupportedError

__all__ = ["library"]


def library(name: str, *, extra: str = "study") -> Any:
    """A module of one of them. Raises UnsupportedError, with its remedy, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"This part of a study needs {name.partition('.')[0]}. "
            f"Install it with: pip install 'deltatune[{extra}]'"
        ) from error
