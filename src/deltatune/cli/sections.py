"""Sections of a report on a terminal: their texts and tables; figures are in the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from deltatune.study import section

__all__ = ["as_text"]


def as_text(shown: section.Section) -> Iterator[RenderableType]:
    """Yields what a terminal shows of a section; nothing of one that has figures alone."""
    from deltatune.study.section import Table as Values

    if not shown.text and not any(isinstance(part, Values) for part in shown.parts):
        return
    yield f"{shown.title} ({shown.paper})" if shown.paper else shown.title
    yield from shown.text
    for part in shown.parts:
        if isinstance(part, Values):
            yield _table(part)
            if part.note:
                yield part.note
    yield ""


def _table(values: section.Table) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=values.title, title_justify="left")
    for column in values.columns:
        table.add_column(Text(column.title), justify="left" if column.kind == "text" else "right")
    for number, row in enumerate(values.rows):
        style = "italic" if number in values.averages else ""
        written = (c.write(value) for c, value in zip(values.columns, row, strict=True))
        table.add_row(*(Text(text, style=style) for text in written))
    return table
