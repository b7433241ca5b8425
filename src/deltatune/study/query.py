"""Questions to a study in SQL, answered by DuckDB in memory, with nothing else in reach.

`cells` has a row for each cell that is done or failed, with the columns of `study.flat`; those with
dots are fields of structures, so that `settings.learning_rate` needs no quotes. `curve` has a row
for each moment of a run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.study.flat import COLUMNS, CURVE, Column, Value, curve, flatten
from deltatune.study.libraries import library
from deltatune.study.store import Store

if TYPE_CHECKING:
    import duckdb

__all__ = ["Answer", "query"]

_TYPES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN", object: "JSON"}
_CLOSED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
_COLUMN = re.compile(r'(?:Referenced column|column named|find key) "([^"]+)"')
_TABLE = re.compile(r"Table with name (\S+) does not exist")


@dataclass(frozen=True)
class Answer:
    """What a query found: names of columns, and rows with a value for each."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def query(store: Store, sql: str) -> Answer:
    """Answers a query.

    Args:
        store: of the study.
        sql: one SELECT over `cells` and `curve`, in the dialect of DuckDB.

    Raises:
        ConfigurationError: the text is not one SELECT, or cannot be answered.
        UnknownNameError: there is no such table or column.
        UnsupportedError: DuckDB is not installed.
        DataError: the store is damaged.
    """
    duckdb = library("duckdb")
    flat = flatten(store)
    cells = (*flat.columns, *_empty(flat.columns))
    points = tuple(Column((name,), kind) for name, kind in CURVE.items())
    try:
        with duckdb.connect(":memory:", config=_CLOSED) as connection:
            _fill(connection, "cells", cells, flat.rows)
            _fill(connection, "curve", points, curve(store))
            connection.execute("SET python_enable_replacements = false")
            connection.execute("SET lock_configuration = true")
            return _answer(connection, sql)
    except duckdb.Error as error:
        raise _explained(error, [column.name for column in (*cells, *points)]) from error


def _answer(connection: duckdb.DuckDBPyConnection, sql: str) -> Answer:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        found = ", ".join(kinds) or "nothing"
        raise ConfigurationError(f"A query is one SELECT, which changes nothing. Found {found}.")
    answer = connection.execute(statements[0])
    rows = tuple(answer.fetchall())
    return Answer(tuple(one[0] for one in answer.description or ()), rows)


def _empty(columns: Iterable[Column]) -> list[Column]:
    """Columns for the names with a star under which no cell has anything: they are known too."""
    names = [column.name for column in columns]
    stars = [name.removesuffix("*") for name in COLUMNS if name.endswith("*")]
    return [
        Column(tuple(star.split(".")[:-1]), object)
        for star in stars
        if not any(name.startswith(star) for name in names)
    ]


def _fill(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    columns: Sequence[Column],
    rows: Iterable[Mapping[str, Value]],
) -> None:
    """Makes a table; all rows go in as one JSON text, with the types of the columns."""
    structure: dict[str, Any] = {}
    for column in columns:
        _put(structure, column.path, _TYPES[column.type])
    nested = []
    for row in rows:
        nested.append(values := dict[str, Any]())
        for column in columns:
            _put(values, column.path, _in_json(row.get(column.name)))
    connection.execute(
        f"CREATE TABLE {name} AS SELECT row.* FROM (SELECT unnest(from_json(?::JSON, ?)) AS row)",
        [json.dumps(nested), json.dumps([structure])],
    )


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        values = values.setdefault(name, {})
    values[last] = value


def _in_json(value: Value) -> Value:
    """JSON has no infinities; DuckDB reads their names."""
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return str(value)
    return value


def _explained(error: duckdb.Error, columns: Collection[str]) -> ConfigurationError:
    """Returns DuckDB's complaint as one of our errors."""
    said = str(error)
    if found := _COLUMN.search(said):
        if found[1] not in columns:
            return UnknownNameError("column", found[1], columns)
        parts = [part if part.isidentifier() else f'"{part}"' for part in found[1].split(".")]
        return ConfigurationError(
            f"'{found[1]}' is a field of a column. Quotes stand around its parts, where they must: "
            f"{'.'.join(parts)}"
        )
    if found := _TABLE.search(said):
        return UnknownNameError("table", found[1], ("cells", "curve"))
    if said.startswith("Permission Error"):
        return ConfigurationError(
            "A query sees the study alone; files and the network are closed to it. Ask for what is"
            " in the tables cells and curve."
        )
    return ConfigurationError(
        f"DuckDB cannot answer this query: {said.splitlines()[0]}. `describe cells` shows what"
        " there is."
    )
