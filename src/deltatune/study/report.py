"""A report as one HTML page that needs nothing but itself: no file beside it and no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltatune.study.canvas import printable
from deltatune.study.drawing import draw
from deltatune.study.files import write_whole
from deltatune.study.section import Column, Figure, Listing, Section, Table, Value, number_of

__all__ = ["render", "write"]

MANY_SECTIONS = 3  # more want a table of contents
_JOINT = re.compile(r"[|_,(=]")


def render(
    title: str, subtitle: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """Returns a report as HTML, the same bytes for the same report. All texts in it are escaped.

    Args:
        title: of the page.
        subtitle: below it.
        facts: (name, value) of what holds for the whole report.
        sections: what it says.

    Raises:
        UnsupportedError: there are figures, and matplotlib is missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["breaking"] = _breaking
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        sections=sections,
        with_contents=len(sections) > MANY_SECTIONS,
        parts=[[_part(part) for part in section.parts] for section in sections],
    )


def write(
    path: str | os.PathLike[str],
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
) -> Path:
    """Writes a report as `render` makes it, whole or not at all, and returns where.

    Raises:
        StateError: the file cannot be written.
        UnsupportedError: there are figures, and matplotlib is missing.
    """
    html = render(title, subtitle, facts, sections)
    return write_whole(path, html.encode(), "report")


def _breaking(text: str, longest: int) -> str:
    """Returns a text as HTML in which words longer than `longest` letters may be broken behind the
    joints that names of code have. Elsewhere they are where a column is too narrow.
    """
    from markupsafe import Markup, escape

    words = re.split(r"(\s+)", str(escape(printable(text))))
    joined = (_JOINT.sub(r"\g<0><wbr>", w) if len(w) > longest else w for w in words)
    return Markup("".join(joined))


def _part(part: Table | Figure | Listing) -> dict[str, Any]:
    """Returns what the template needs for a table, a figure or a listing."""
    from markupsafe import Markup

    if isinstance(part, Table):
        return {"kind": "table", "table": part, "rows": _rows(part)}
    if isinstance(part, Listing):
        return {"kind": "listing", "title": part.title, "text": part.text}
    # The only text that is not escaped here: it is our own XML, escaped where it was written.
    return {"kind": "figure", "title": part.title, "svg": Markup(draw(part))}


def _rows(table: Table) -> list[dict[str, Any]]:
    best = table.best_places()
    return [
        {
            "average": number in table.averages,
            "cells": [
                {**_cell(value, column), "best": (number, place) in best}
                for place, (value, column) in enumerate(zip(row, table.columns, strict=True))
            ],
        }
        for number, row in enumerate(table.rows)
    ]


def _cell(value: Value, column: Column) -> dict[str, Any]:
    """Returns how a value is written, its deviation, and the number it is sorted by."""
    number = number_of(value)
    return {
        "text": column.mean(value),
        "deviation": column.deviation(value),
        "number": None if number is None else repr(float(number)),
        "missing": number is None and not isinstance(value, str),
    }
