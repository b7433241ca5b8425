"""What a study found, for other programs: its cells as rows, its tables for a text."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.study import page
from deltatune.study.experiment import STUDY
from deltatune.study.files import write_whole
from deltatune.study.findings import findings
from deltatune.study.flat import Value, flatten
from deltatune.study.latex import as_latex, table_as_latex
from deltatune.study.libraries import library
from deltatune.study.plain import table_as_csv, table_as_markdown
from deltatune.study.section import Table
from deltatune.study.store import Store
from deltatune.study.summary import Summary, summarise
from deltatune.study.table import as_markdown

__all__ = ["FORMATS", "export", "tables", "write_export"]


def export(store: Store, form: str, table: str | None = None) -> bytes:
    """Returns a study in one of the `FORMATS`.

    "json", "csv" and "parquet" hold the rows of `study.flat`; numbers that are not finite are null
    in JSON, which does not know them. "latex" and "markdown" hold the table of a comparison, of
    another study all tables of its report.

    Args:
        store: of the study.
        form: of the export.
        table: one table of the report alone, by its name in `tables` or, where that is clear, by
            its title; as "csv", "latex" or "markdown".

    Raises:
        UnknownNameError: there is no such format or table.
        ConfigurationError: several tables have the title; one is asked for in a form of cells.
        StateError: there is no comparison to make a table of.
        UnsupportedError: pyarrow, which writes Parquet, is not installed.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    if table is None:
        return FORMATS[form](store)
    if form not in TABLE_FORMATS:
        raise ConfigurationError(
            f"A table is written as {', '.join(TABLE_FORMATS)}; {form} is for cells."
        )
    known = tables(store)
    found = [name for name in known if table in (name, known[name].title)]
    if not found:
        raise UnknownNameError("table", table, {one.title for one in known.values()})
    if len(found) > 1:
        raise ConfigurationError(
            f"{table!r} is the title of several: {'; '.join(found)}. Name one."
        )
    return TABLE_FORMATS[form](found[0], known[found[0]]).encode()


def tables(store: Store) -> dict[str, Table]:
    """Returns "section: title" -> every table of the report of a study. Raises StateError."""
    studied = store.note(STUDY) is not None
    shown = findings(store).sections if studied else page.sections(summarise(store))
    return {
        f"{section.title}: {part.title}": part
        for section in shown
        for part in section.parts
        if isinstance(part, Table)
    }


def write_export(
    store: Store, form: str, path: str | os.PathLike[str], table: str | None = None
) -> Path:
    """Writes an export, whole or not at all. Raises as `export`; StateError if it cannot write."""
    return write_whole(path, export(store, form, table), "export")


def _json(store: Store) -> bytes:
    rows = [{name: _finite(value) for name, value in row.items()} for row in flatten(store).rows]
    return (json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(store: Store) -> bytes:
    flat, file = flatten(store), io.StringIO()
    writer = csv.DictWriter(file, [column.name for column in flat.columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat.rows)
    return file.getvalue().encode()


def _parquet(store: Store) -> bytes:
    pyarrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    types = {
        str: pyarrow.string(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        bool: pyarrow.bool_(),
    }
    flat, file = flatten(store), io.BytesIO()
    columns = {
        column.name: pyarrow.array([row[column.name] for row in flat.rows], types[column.type])
        for column in flat.columns
    }
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _of_tables(store: Store, form: str, of_comparison: Callable[[Summary], str]) -> bytes:
    """The table of a comparison alone in its own form, else all tables of the report."""
    if store.note(STUDY) is None:
        return of_comparison(summarise(store)).encode()
    write = TABLE_FORMATS[form]
    return "\n".join(write(name, table) for name, table in tables(store).items()).encode()


def _markdown(name: str, table: Table) -> str:
    return f"### {name}\n\n{table_as_markdown(table)}"


# A table and its name -> text.
TABLE_FORMATS: dict[str, Callable[[str, Table], str]] = {
    "csv": lambda name, table: table_as_csv(table),
    "latex": lambda name, table: table_as_latex(table, name),
    "markdown": _markdown,
}
FORMATS: dict[str, Callable[[Store], bytes]] = {
    "json": _json,
    "parquet": _parquet,
    "csv": _csv,
    "latex": lambda store: _of_tables(store, "latex", as_latex),
    "markdown": lambda store: _of_tables(store, "markdown", as_markdown),
}
