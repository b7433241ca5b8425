"""Rows out of files: jsonl, json, csv, tsv and parquet, with the line of every complaint."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from deltatune.core.errors import DataError, UnsupportedError
from deltatune.tasks.example import Row

__all__ = ["FORMATS", "file_format", "read_rows", "sha256"]


def sha256(path: Path) -> str:
    """Returns the SHA-256 of the bytes of a file, in hexadecimal digits. Raises DataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from None


def file_format(path: Path) -> str | None:
    """Returns "jsonl", "json", "csv", "tsv" or "parquet" by the file's name; None for any other."""
    name = path.name.lower().removesuffix(".gz")
    suffix = name.rpartition(".")[2]
    return suffix if suffix in FORMATS else None


def read_rows(path: Path) -> tuple[Row, ...]:
    """Returns the rows of a data file, in order.

    Raises:
        DataError: the file is missing, empty, truncated, of an unknown format, or has a broken
            line; the message names the file and the line.
    """
    name = file_format(path)
    if name is None:
        known = ", ".join("." + suffix for suffix in FORMATS)
        raise DataError(f"{path}: not a data file. Expected one of {known} (.gz may follow).")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    place = Place(path)
    try:
        rows = tuple(FORMATS[name](path, place))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place.next}: not UTF-8 ({error.reason}). Save the file as UTF-8."
        ) from error
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{place.next}: the file ends too early or is damaged ({error}). Copy it again."
        ) from error
    if not rows:
        raise DataError(f"{path}: the file holds no rows.")
    return rows


class Place:
    """Where a reader is in its file."""

    def __init__(self, path: Path) -> None:
        self.path, self.line = path, 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def next(self) -> str:
        """The line that could not be had."""
        return f"{self.path}:{self.line + 1}"


def _open(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json(text: str, place: object) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = text.strip()[:60]
        raise DataError(
            f"{place}: not JSON ({error.msg}): {shown!r}. Mend or delete it."
        ) from error


def _record(value: Any, place: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected an object with named fields, found {str(value)[:60]!r}."
        )
    return value


def _jsonl(path: Path, place: Place) -> Iterator[Row]:
    with _open(path) as file:
        for place.line, line in enumerate(file, start=1):
            if line.strip():
                yield Row(_record(_json(line, place), place), str(place))


def _whole_json(path: Path, place: Place) -> Iterator[Row]:
    with _open(path) as file:
        content = _json(file.read(), path)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, found {str(content)[:60]!r}.")
    for number, value in enumerate(content, start=1):
        where = f"{path}, item {number}"
        yield Row(_record(value, where), where)


def _separated(separator: str) -> Callable[[Path, Place], Iterator[Row]]:
    def read(path: Path, place: Place) -> Iterator[Row]:
        with _open(path) as file:
            lines = csv.reader(file, delimiter=separator, strict=True)
            try:
                header = next(lines, [])
                for values in lines:
                    place.line = lines.line_num
                    if not values:
                        continue
                    if len(values) != len(header):
                        raise DataError(
                            f"{place}: {len(values)} values, but the header names {len(header)} "
                            f"columns ({', '.join(header)[:80]}). Is a quote or a separator "
                            "missing?"
                        )
                    yield Row(dict(zip(header, values, strict=True)), str(place))
            except csv.Error as error:
                raise DataError(f"{path}:{lines.line_num}: a broken line ({error}).") from error

    return read


def _parquet(path: Path, place: Place) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: reading parquet needs pyarrow. Install it with: pip install 'deltatune[data]'"
        ) from error
    try:
        content = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole parquet file ({error}). Copy it again.") from error
    for number, value in enumerate(content, start=1):
        yield Row(value, f"{path}, row {number}")


FORMATS: Mapping[str, Callable[[Path, Place], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _whole_json,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "parquet": _parquet,
}
"""Suffix to reader."""
