"""What a person sees of a comparison as it goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltatune.study.watching import in_short

if TYPE_CHECKING:
    from deltatune.study.runner import Event, Watch

__all__ = ["choose_watch", "describe"]


def describe(event: Event) -> str:
    """Returns an event as a line; "" for those that say nothing new."""
    where = f"[{event.finished}/{event.total}] {event.cell}"
    if event.kind == "done" and event.result is not None:
        return f"{where}: {in_short(event.result)}"
    if event.kind == "failed":
        return f"{where}: FAILED, {event.error}"
    if event.kind == "kept" and event.error is not None:
        return f"{where}: failed before, {event.error}"
    if event.kind == "elsewhere":
        return f"{where}: another process has it"
    return ""


@contextmanager
def choose_watch() -> Iterator[Watch]:
    """Gives what shows events on standard error: on a terminal a bar with lines above it."""
    if not sys.stderr.isatty():
        yield _print
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)

        def watch(event: Event) -> None:
            progress.update(
                bar, total=event.total, completed=event.finished, description=str(event.cell)
            )
            if line := describe(event):
                progress.console.print(line, markup=False, highlight=False)

        yield watch


def _print(event: Event) -> None:
    if line := describe(event):
        print(line, file=sys.stderr, flush=True)
