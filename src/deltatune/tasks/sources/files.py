"""The user's own files: rows for a record, or a classification task without a record."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.core.errors import ConfigurationError, DataError, UnknownNameError
from deltatune.tasks.example import Row, SplitName, Tables
from deltatune.tasks.sources.reading import file_format, read_rows, sha256
from deltatune.tasks.specification import FilesSpecification, Lengths, Provenance
from deltatune.tasks.text import digest
from deltatune.tasks.turns import TARGET, TEMPLATE

if TYPE_CHECKING:
    from deltatune.tasks.task import Task

__all__ = ["FilesSource", "task_from_files"]

_SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
)
_TEXTS = (
    "text", "sentence", "content", "document", "review", "comment", "message", "body", "tweet",
    "sms", "input", "utterance", "query", "question", "title", "abstract",
)  # fmt: skip
_LABELS = (
    "label", "labels", "class", "category", "target", "sentiment", "tag", "topic", "intent", "y",
    "answer", "rating", "stars", "score",
)  # fmt: skip
_MOST_LABELS = 1000
_ANSWER_LENGTHS = Lengths(source=512, target=256)


@dataclass(frozen=True)
class FilesSource:
    """Local files, as a record or `task_from_files` names them.

    Attributes:
        specification: the files, and the columns where they are not called as the record's fields.
    """

    specification: FilesSpecification

    def read(self, task: Task) -> Tables:
        """Returns the rows under the names of the record's fields.

        Raises:
            DataError: a file or a column is missing, or a file cannot be read.
        """
        paths = self.paths()
        splits = {
            name: tuple(self._renamed(row, task.fields) for row in read_rows(path))
            for name, path in paths.items()
        }
        sums = {name: sha256(path) for name, path in paths.items()}
        origin = ", ".join(path.name for path in paths.values())
        return Tables(splits, f"local files {origin}", "local", digest(sums))

    def paths(self) -> dict[SplitName, Path]:
        """Returns the file of each split; a single file of all rows counts as train."""
        given = self.specification
        named: dict[SplitName, str | None] = {
            "train": given.train,
            "validation": given.validation,
            "test": given.test,
        }
        files = {name: Path(path) for name, path in named.items() if path}
        if (given.path is None) == (not files):
            raise ConfigurationError(
                "Name either one `path` or a file for each split, found both or none."
            )
        if given.path is None:
            return files
        path = Path(given.path)
        return _files_of_folder(path) if path.is_dir() else {"train": path}

    def _renamed(self, row: Row, fields: Sequence[str]) -> Row:
        values: dict[str, Any] = {}
        for field in fields:
            column = self.specification.columns.get(field, field)
            if column not in row.values:
                raise DataError(f"{row.where}: {UnknownNameError('column', column, row.values)}")
            values[field] = row.values[column]
        return Row(values, row.where)


def _files_of_folder(folder: Path) -> dict[SplitName, Path]:
    data = [path for path in sorted(folder.iterdir()) if path.is_file() and file_format(path)]
    found: dict[SplitName, Path] = {}
    for name, spellings in _SPLIT_NAMES.items():
        matching = [path for path in data if path.name.lower().split(".")[0] in spellings]
        if len(matching) > 1:
            both = " and ".join(path.name for path in matching)
            raise DataError(f"{folder}: {both} both look like the {name} split. Keep one.")
        if matching:
            found[name] = matching[0]
    if "train" in found:
        return found
    if len(data) == 1:
        return {"train": data[0]}
    names = ", ".join(path.name for path in data) or "no data file"
    raise DataError(
        f"{folder}: expected train.jsonl (or .csv, .tsv, .json, .parquet; beside it validation and "
        f"test, if there are) or one data file alone, found {names}."
    )


def task_from_files(
    path: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    metric: str | None = None,
    name: str | None = None,
) -> Task:
    """Returns a task over the user's files.

    With the columns `prompt` and `completion`, or with `messages` (a list of turns with `role` and
    `content`), the task is to write the completion, or the last turn; else it is classification.

    Args:
        path: one file (cut 80/10/10 by a hash of each row's text) or a folder with train, and
            validation and test if there are.
        text: column of the text, or two columns for a pair. None finds it by its name.
        label: column of the label, strings or whole numbers. None finds it by its name.
        labels: the label words in the order of the classes. None takes those found, sorted.
        metric: a name of `metrics.METRICS`; None takes ACC for classes and Rouge-L for texts.
        name: the task's name. None takes that of the file or folder.

    Raises:
        DataError: a file cannot be read, a column is not there or cannot be told, a label is
            missing, or the labels look like anything but classes.
    """
    path = Path(path)
    paths = FilesSource(FilesSpecification(path=str(path))).paths()
    rows = [row for file in paths.values() for row in read_rows(file)]
    columns = list(rows[0].values)
    name = name or re.sub(r"[^a-z0-9_\-]+", "_", path.name.lower().split(".")[0]).lstrip("_-")
    if text is None and label is None:
        form = next((form for form in _WRITTEN if set(form["fields"]) <= set(columns)), None)
        if form is not None:
            return _task(name, path, kind="generation", metric=metric or "Rouge-L", **form)
    label_column = _label_column(columns, label, path)
    text_columns = _text_columns(columns, text, label_column, path)
    fields = ("text",) if len(text_columns) == 1 else ("text_1", "text_2")
    template = " [SEP] ".join(f"{{{{ {field} | strip }}}}" for field in fields)
    return _task(
        name,
        path,
        dict(zip((*fields, "label"), (*text_columns, label_column), strict=True)),
        kind="classification",
        metric=metric or "ACC",
        fields=(*fields, "label"),
        template=template,
        texts=tuple(f"{{{{ {field} | strip }}}}" for field in fields),
        label="label",
        labels=tuple(labels) if labels else _labels_found(rows, label_column, path),
        lengths=Lengths(),
    )


# What is written rather than chosen, by the columns that tell it.
_WRITTEN: tuple[dict[str, Any], ...] = (
    {
        "fields": ("messages",),
        "turns": "messages",
        "template": TEMPLATE,
        "target": TARGET,
        "continues": True,
        "lengths": _ANSWER_LENGTHS,
    },
    {
        "fields": ("prompt", "completion"),
        "template": "{{ prompt }}",
        "target": "{{ completion }}",
        "continues": True,
        "lengths": _ANSWER_LENGTHS,
    },
)


def _task(name: str, path: Path, columns: dict[str, str] | None = None, **parts: Any) -> Task:
    from deltatune.tasks.task import Task

    return Task(
        name=name,
        version=1,
        title=path.name,
        provenance=Provenance(category="User", paper="the user's own files", licence="not stated"),
        source=FilesSpecification(path=str(path.absolute()), columns=columns or {}),
        drop_empty=True,
        **parts,
    )


def _by_name(columns: Sequence[str], wanted: str) -> str | None:
    return next((column for column in columns if column.strip().lower() == wanted), None)


def _label_column(columns: Sequence[str], label: str | None, path: Path) -> str:
    if label is not None:
        return _given(columns, label, path)
    for wanted in _LABELS:
        column = _by_name(columns, wanted)
        if column is not None:
            return column
    raise DataError(
        f"{path}: cannot tell which column holds the label; there are {', '.join(columns)}. Name "
        "it "
        "with label=..."
    )


def _text_columns(
    columns: Sequence[str], text: str | Sequence[str] | None, label: str, path: Path
) -> tuple[str, ...]:
    if text is not None:
        given = (text,) if isinstance(text, str) else tuple(text)
        if len(given) not in (1, 2):
            raise ConfigurationError(f"Expected one or two columns of text, found {len(given)}.")
        return tuple(_given(columns, column, path) for column in given)
    others = [column for column in columns if column != label]
    for pair in _PAIRS:
        first, second = (_by_name(others, wanted) for wanted in pair)
        if first is not None and second is not None:
            return (first, second)
    for wanted in _TEXTS:
        column = _by_name(others, wanted)
        if column is not None:
            return (column,)
    if len(others) == 1:
        return (others[0],)
    raise DataError(
        f"{path}: cannot tell which column holds the text; there are {', '.join(columns)}. Name it "
        "with text=..."
    )


def _given(columns: Sequence[str], column: str, path: Path) -> str:
    if column not in columns:
        raise DataError(f"{path}: {UnknownNameError('column', column, columns)}")
    return column


def _labels_found(rows: Sequence[Row], column: str, path: Path) -> tuple[str, ...]:
    found: set[str] = set()
    for row in rows:
        value = row.values.get(column)
        if value is None or value == "":
            raise DataError(
                f"{row.where}: the label ({column!r}) is missing. Give it or delete the row."
            )
        found.add(_word(value, row.where))
    if len(found) < 2:
        raise DataError(f"{path}: the column {column!r} holds one label only, {found.pop()!r}.")
    if len(found) > _MOST_LABELS or (len(found) > 20 and len(found) > len(rows) / 2):
        raise DataError(
            f"{path}: the column {column!r} holds {len(found)} different values in {len(rows)} "
            "rows, "
            "which is no set of classes. Name the label's column with label=..."
        )
    return tuple(sorted(found, key=_natural))


def _word(value: Any, where: str) -> str:
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{where}: the label {value!r} is a number between classes.")
        return str(int(value))
    return str(value)


def _natural(word: str) -> tuple[float, str]:
    return (float(word) if re.fullmatch(r"-?\d+", word) else math.inf, word)
