"""What a study found, for other programs: its cells as rows, its table for a text."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from deltatune.core.errors import UnknownNameError
from deltatune.study.files import write_whole
from deltatune.study.flat import Value, flatten
from deltatune.study.latex import as_latex
from deltatune.study.libraries import library
from deltatune.study.store import Store
from deltatune.study.summary import summarise
from deltatune.study.table import as_markdown

__all__ = ["FORMATS", "export", "write_export"]


def export(store: Store, form: str) -> bytes:
    """Returns a study in one of the `FORMATS`.

    "json", "csv" and "parquet" hold the rows of `study.flat`; numbers that are not finite are null
    in JSON, which does not know them. "latex" and "markdown" hold the table of the comparison.

    Raises:
        UnknownNameError: there is no such format.
        StateError: there is no comparison to make a table of.
        UnsupportedError: pyarrow, which writes Parquet, is not installed.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    return FORMATS[form](store)


def write_export(store: Store, form: str, path: str | os.PathLike[str]) -> Path:
    """Writes an export, whole or not at all. Raises as `export`; StateError if it cannot write."""
    return write_whole(path, export(store, form), "export")


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


FORMATS: dict[str, Callable[[Store], bytes]] = {
    "json": _json,
    "parquet": _parquet,
    "csv": _csv,
    "latex": lambda store: as_latex(summarise(store)).encode(),
    "markdown": lambda store: as_markdown(summarise(store)).encode(),
}
