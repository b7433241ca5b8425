"""A table of a report as text for other programs: CSV with all digits, Markdown as it is shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from deltatune.study.section import Column, Table, Value, number_of
from deltatune.study.summary import Spread

__all__ = ["table_as_csv", "table_as_markdown"]


def table_as_csv(table: Table) -> str:
    """Returns the values as they are, scores as fractions. The standard deviation over the seeds
    has a column of its own where there is one.
    """
    spread = [
        any(isinstance(row[place], Spread) for row in table.rows)
        for place in range(len(table.columns))
    ]

    def wide(row: tuple[Value, ...]) -> Iterator[str | float | None]:
        for value, has_deviation in zip(row, spread, strict=True):
            yield value if isinstance(value, str) else number_of(value)
            if has_deviation:
                yield value.deviation if isinstance(value, Spread) else None

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_heads(table.columns, spread))
    writer.writerows(map(wide, table.rows))
    return file.getvalue()


def _heads(columns: tuple[Column, ...], spread: list[bool]) -> Iterator[str]:
    for column, has_deviation in zip(columns, spread, strict=True):
        yield column.title
        if has_deviation:
            yield f"{column.title}, deviation"


def table_as_markdown(table: Table) -> str:
    """Returns the table as a report shows it, the best scores bold, its note below."""
    best = table.best_places()
    marks = ("---" if column.kind == "text" else "---:" for column in table.columns)
    lines = [_line([column.title for column in table.columns]), f"|{'|'.join(marks)}|"]
    for number, row in enumerate(table.rows):
        texts = [c.write(value) for c, value in zip(table.columns, row, strict=True)]
        bold = [f"**{t}**" if (number, place) in best else t for place, t in enumerate(texts)]
        lines.append(_line(bold))
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def _line(texts: list[str]) -> str:
    escaped = (" ".join(text.split()).replace("|", "\\|") for text in texts)
    return f"| {' | '.join(escaped)} |"
