"""All cells of a store as flat rows: nested values become columns with dots in their names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from deltatune.study.store import Done, Failed, Store

__all__ = ["COLUMNS", "CURVE", "Column", "Flat", "Value", "curve", "flatten"]

Value: TypeAlias = str | int | float | bool | None

# Name -> type of its values; None where there is none to show. The names are those of `Cell` and
# `CellResult`, but `target` (`Cell.at`, which is a word of SQL) and `state` ("done" or "failed").
# A star stands for a column for each name that occurs; None: of the type that its values have.
COLUMNS: dict[str, type | None] = {
    "id": str,
    "state": str,
    "recorded": str,
    "writer": str,
    "backbone": str,
    "revision": str,
    "method": str,
    "target": str,
    "task": str,
    "protocol": str,
    "data": str,
    "seed": int,
    "budget": str,
    "code": str,
    "settings.optimiser": str,
    "settings.learning_rate": float,
    "settings.weight_decay": float,
    "settings.betas": str,
    "settings.optimiser_options.*": None,
    "settings.schedule": str,
    "settings.warmup_steps": int,
    "settings.warmup_ratio": float,
    "settings.max_norm": float,
    "settings.per_device_batch_size": int,
    "settings.accumulation": int,
    "settings.tokens_per_pass": int,
    "settings.packing": bool,
    "settings.precision": str,
    "settings.evaluation_every": int,
    "settings.patience": int,
    "settings.keep_best": bool,
    "settings.seed": int,
    "settings.length_grouped": bool,
    "settings.base_dropout": bool,
    "settings.base_dropout_steps": int,
    "settings.checkpoint_every": int,
    "stages": str,
    "options.*": None,
    "metric": str,
    "score": float,
    "scores.*": float,
    "validation.*": float,
    "measured.*": float,
    "majority": float,
    "category": str,
    "status": str,
    "notes": str,
    "trainable": int,
    "stored": int,
    "base": int,
    "ratio": float,
    "rows.*": int,
    "steps": int,
    "seconds": float,
    "total_seconds": float,
    "memory": int,
    "device": str,
    "machine": str,
    "versions.*": str,
    "artefact": str,
    "error": str,
    "message": str,
}
# The columns of curves: a row for each moment of each cell that is done.
CURVE: dict[str, type] = {
    "id": str,
    "step": int,
    "seconds": float,
    "loss": float,
    "validation": float,
}


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        path: the names that lead to its values; `scores.ACC` is ("scores", "ACC").
        type: str, int, float or bool.
    """

    path: tuple[str, ...]
    type: type

    @property
    def name(self) -> str:
        """The path with dots between."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Flat:
    """Rows, each with a value or None for every column, by its name."""

    columns: tuple[Column, ...]
    rows: tuple[dict[str, Value], ...]


def flatten(store: Store) -> Flat:
    """Returns the cells that are done or failed, in the order in which they ended."""
    records = [_values(record) for record in store.recorded().values()]
    columns = [column for name in COLUMNS for column in _columns(name, records)]
    rows = tuple(
        {column.name: _shaped(_at(values, column.path), column.type) for column in columns}
        for values in records
    )
    return Flat(tuple(columns), rows)


def curve(store: Store) -> tuple[dict[str, Value], ...]:
    """Returns a row of `CURVE` for each moment of the cells that are done."""
    return tuple(
        {"id": key, **point.model_dump()}
        for key, record in store.done().items()
        for point in record.result.curve
    )


def _values(record: Done | Failed) -> dict[str, Any]:
    """A record as nested values, with the names of the columns."""
    cell = record.cell.model_dump()
    values = {
        **cell,
        "target": cell["at"],
        "id": record.id,
        "state": record.kind,
        "recorded": record.when,
        "writer": record.writer,
    }
    if isinstance(record, Failed):
        return {**values, "error": record.error, "message": record.message}
    result = record.result
    more = {"score": result.score, "ratio": result.ratio, "notes": "\n".join(result.notes)}
    return {**values, **result.model_dump(exclude={"curve"}), **more}


def _columns(name: str, records: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The column of a name; several, one or none where it ends with a star."""
    kind = COLUMNS[name]
    *parents, last = name.split(".")
    if last != "*":
        assert kind is not None
        return [Column((*parents, last), kind)]
    found: dict[str, list[Value]] = {}
    for values in records:
        for key, value in (_at(values, parents) or {}).items():
            found.setdefault(key, []).append(value)
    return [
        Column((*parents, key), kind or _common_type(values))
        for key, values in sorted(found.items())
    ]


def _common_type(values: Iterable[Value]) -> type:
    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        return float
    return types.pop() if len(types) == 1 else str


def _at(values: Mapping[str, Any], path: Iterable[str]) -> Any:
    found: Any = values
    for name in path:
        found = (found or {}).get(name)
    return found


def _shaped(value: Any, kind: type) -> Value:
    """A value as its column holds it: lists as JSON, nothing where there is none."""
    if value is None or value == ():
        return None
    if kind is str:
        return value if isinstance(value, str) else json.dumps(value)
    shaped: Value = kind(value)
    return shaped
