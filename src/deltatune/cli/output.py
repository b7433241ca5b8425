"""What commands print: a table or text for people, one JSON object for machines.

Results go to standard output; progress and warnings to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType

__all__ = ["console", "print_json", "resumable", "show", "warn"]


def console() -> Console:
    """Returns the console for results. Piped output is as wide as it needs to be."""
    printer = Console()
    return printer if printer.is_terminal else Console(width=max(printer.width, 160))


def show(*parts: RenderableType) -> None:
    """Prints renderables; texts are printed as they are, without markup."""
    printer = console()
    for part in parts:
        printer.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def warn(text: str) -> None:
    """Prints a line on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def resumable() -> Iterator[None]:
    """Says, when the work within is interrupted, that it is not lost. Ends with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        warn("deltatune: stopped. The same command goes on from here.")
        raise typer.Exit(130) from None


def print_json(data: Any) -> None:
    """Prints one JSON object. What is not a number (NaN, infinities) becomes null."""
    print(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not (-float("inf") < data < float("inf")):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data
