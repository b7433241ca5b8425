"""`deltatune study watch`: a running study, live."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltatune.cli.options import Study
from deltatune.cli.output import console, show
from deltatune.core.errors import ConfigurationError

if TYPE_CHECKING:
    from deltatune.study.store import Store
    from deltatune.study.watching import Ended, Snapshot

__all__ = ["picture", "watch"]

EVERY = 1.0  # seconds between looks
SHOWN = 12  # lines of a list on a terminal


def watch(
    folder: Study,
    page: Annotated[
        bool, typer.Option("--page", help="Serve a page to this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Of the page; else any that is free."),
    ] = None,
) -> None:
    """Watch a study as it runs, live; a line for each cell that ends where this is no terminal.

    Ends when nothing is left to run, or with Ctrl-C. The study is not disturbed.
    """
    if port is not None and not page:
        raise ConfigurationError("--port is that of the page. Give --page too.")
    from deltatune.study.store import open_study

    store = open_study(folder)
    with contextlib.suppress(KeyboardInterrupt):  # who has seen enough interrupts nothing
        if page:
            _serve(store, port or 0)
        elif console().is_terminal and not console().is_dumb_terminal:
            _show_live(store)
        else:
            _print_lines(store)


def _serve(store: Store, port: int) -> None:
    from deltatune.study.serving import PageServer

    with PageServer(store, port) as server:
        show(f"page: {server.address}")
        server.serve_forever()


def _show_live(store: Store) -> None:
    from deltatune.study.watching import snapshot

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            seen = snapshot(store)
            live.update(picture(seen), refresh=True)
            if seen.ended:
                return
            time.sleep(EVERY)


def _print_lines(store: Store) -> None:
    """Prints how far the study is, a line for each cell that ends, and how far it came."""
    from deltatune.study.store import Note
    from deltatune.study.watching import snapshot, what_became

    told, seen = len(store.records()), snapshot(store)
    show(_counts(seen))
    while not seen.ended:
        time.sleep(EVERY)
        seen, records = snapshot(store), store.records()
        ended = [record for record in records[told:] if not isinstance(record, Note)]
        for record in ended:
            became = what_became(record)
            show(f"{became.cell}: {'FAILED, ' if became.failed else ''}{became.said}")
        if ended:
            show(_counts(seen))
        told = len(records)


def picture(seen: Snapshot) -> RenderableType:
    """Returns what a terminal shows of a study at one moment."""
    return Group(*_parts(seen))


def _parts(seen: Snapshot) -> Iterator[RenderableType]:
    bar = ProgressBar(total=max(1, seen.planned), completed=seen.done + seen.failed, width=40)
    head = Table.grid(padding=(0, 2))
    head.add_row(bar, Text(_counts(seen)))
    yield head
    works = [
        (work.cell, work.worker, "" if work.seconds is None else _time(work.seconds))
        for work in seen.at_work
    ]
    yield from _list("at work", works)
    yield from _list("ended last", [_words(ended) for ended in seen.recent])
    yield from _list("failed", [_words(ended) for ended in seen.failures], "red")


def _words(ended: Ended) -> tuple[str, str]:
    return ended.cell, ended.said


def _counts(seen: Snapshot) -> str:
    counts = (
        f"{seen.done + seen.failed} of {seen.planned}: {seen.done} done, {seen.failed} failed, "
        f"{seen.running} running, {seen.waiting} waiting"
    )
    if seen.waiting and not seen.running:
        return f"{counts}; nobody is at work"
    return f"{counts}; {_time(seen.seconds_left)} left" if seen.seconds_left else counts


def _list(title: str, rows: Sequence[Sequence[str]], style: str = "") -> Iterator[RenderableType]:
    """Yields rows under a title, the first of them where they are many; nothing for none."""
    if not rows:
        return
    yield Text(f"\n{title}", style="bold")
    table = Table.grid(padding=(0, 2))
    for row in rows[:SHOWN]:
        table.add_row(*(Text(text, style=style) for text in row))
    yield table
    if len(rows) > SHOWN:
        yield Text(f"and {len(rows) - SHOWN} more")


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
