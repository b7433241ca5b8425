"""Splits belong to a source and a protocol.

`clean`: the source's own splits; what is missing is held out of train by a hash of the row's text;
then every row of train that validation or test holds too, and every row of validation that test
holds too, is removed. Two rows are the same if their input fields are, or what the template makes
of them, after `text.normalise`.

Before either, rows that the record does not keep (`Task.keep`) are left out.

`faithful`: the published splits are cut as the paper's scores imply, by the record's rule A, B, C
or D (`SplitRule`). Which rows went into which half is unknown; the first half is validation.
Nothing is removed. Where the source does not have the rows that the rule needs, this is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from deltatune.core.errors import ConfigurationError, DataError, UnknownNameError
from deltatune.tasks.example import Example, ProtocolName, Row, SplitName, Splits, Tables
from deltatune.tasks.specification import SplitRule
from deltatune.tasks.task import Task
from deltatune.tasks.text import fraction, normalise

__all__ = ["cut"]

Parts = dict[SplitName, tuple[Row, ...]]
Examples = dict[SplitName, tuple[Example, ...]]

_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
_HELD_OUT = 0.1
_SHUFFLE_SEED = 42
_SHARES = (0.8, 0.1, 0.1)


def cut(task: Task, tables: Tables, protocol: ProtocolName) -> Splits:
    """Returns the examples of `task` from the rows of `tables`, cut by `protocol`.

    Raises:
        UnknownNameError: there is no such protocol.
        DataError: a row cannot be used, a split comes out empty, or "faithful" lacks rows.
    """
    if protocol not in ("clean", "faithful"):
        raise UnknownNameError("protocol", protocol, ("clean", "faithful"))
    notes = [*tables.notes]
    removed: dict[str, int] = {}
    whole = protocol == "faithful" and not tables.final
    parts = _faithful(task, tables, notes) if whole else _completed(task, tables, notes)
    examples = {name: tuple(task.example(row) for row in rows) for name, rows in parts.items()}
    if not whole:
        examples = _without_overlap(task, parts, examples, notes, removed)
    examples = {name: _not_empty(task, part, name, notes) for name, part in examples.items()}
    return Splits(
        examples["train"],
        examples["validation"],
        examples["test"],
        origin=tables.origin,
        status=tables.status,
        notes=tuple(notes),
        removed=removed,
    )


def _not_empty(
    task: Task, examples: tuple[Example, ...], name: str, notes: list[str]
) -> tuple[Example, ...]:
    if task.drop_empty:
        kept = tuple(example for example in examples if example.source.strip())
        if len(kept) < len(examples):
            notes.append(f"{name}: rows with empty text left out: {len(examples) - len(kept)}.")
        examples = kept
    if not examples:
        raise DataError(f"{task.name}: the split {name!r} is empty. Give more rows or own files.")
    return examples


# --- clean
# -------------------------------------------------------------------------------------------


def _completed(task: Task, tables: Tables, notes: list[str]) -> Parts:
    found = {name: _used(task, tables.splits.get(name, ()), name, notes) for name in _NAMES}
    parts: Parts = {name: rows for name, rows in found.items() if rows}
    if "train" not in parts:
        raise DataError(f"{task.name}: {tables.origin} has no training rows.")
    answer = task.outputs
    if answer and not any(_answered(answer, row) for row in parts.get("test", ())):
        parts.pop("test", None)
    if "test" not in parts and "validation" in parts:
        notes.append(
            "No labelled test split: validation serves as test, 10 % of train as validation."
        )
        parts["test"] = parts.pop("validation")
    if "validation" in parts and "test" in parts:
        return parts
    low = 1 - _HELD_OUT if "test" in parts else 1 - 2 * _HELD_OUT
    inputs = task.inputs
    positions = [fraction(*_key(_raw(inputs, row))) for row in parts["train"]]
    high = 1.0 if "test" in parts else 1 - _HELD_OUT
    bounds: tuple[tuple[SplitName, float, float], ...] = (
        ("train", 0.0, low),
        ("validation", low, high),
        ("test", high, 1.0),
    )
    held: Parts = {
        name: tuple(
            row
            for row, position in zip(parts["train"], positions, strict=True)
            if start <= position < end
        )
        for name, start, end in bounds
    }
    held["test"] = parts.get("test", held["test"])
    notes.append("Cut by a hash of the row's text: " + _sizes(held) + " rows.")
    return held


def _used(task: Task, rows: tuple[Row, ...], name: str, notes: list[str]) -> tuple[Row, ...]:
    if task.keep is None:
        return rows
    kept = tuple(row for row in rows if task.keeps(row))
    if len(kept) < len(rows):
        notes.append(f"{name}: rows that the record does not keep: {len(rows) - len(kept)}.")
    return kept


def _answered(fields: Sequence[str], row: Row) -> bool:
    return not any(_is_blank(row.values.get(name)) for name in fields)


def _is_blank(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_blank(part) for part in value.values())
    return value in (None, -1, "", [])


def _without_overlap(
    task: Task, parts: Parts, examples: Examples, notes: list[str], removed: dict[str, int]
) -> Examples:
    inputs = task.inputs
    raw = {name: [_raw(inputs, row) for row in rows] for name, rows in parts.items()}
    marks = {
        name: [
            _Marks(_key(texts), normalise(example.source))
            for texts, example in zip(raw[name], examples[name], strict=True)
        ]
        for name in _NAMES
    }
    test, exact = _Seen(marks["test"]), set(raw["test"])
    validation = _Seen(marks["validation"])
    in_test = [mark in test for mark in marks["train"]]
    in_validation = [mark in validation for mark in marks["train"]]
    validation_in_test = [mark in test for mark in marks["validation"]]
    counts = {
        "train_in_test": sum(in_test),
        "train_in_test_exactly": sum(
            texts in exact for texts, found in zip(raw["train"], in_test, strict=True) if found
        ),
        "train_in_validation": sum(
            found and not before for found, before in zip(in_validation, in_test, strict=True)
        ),
        "validation_in_test": sum(validation_in_test),
    }
    removed |= counts
    if any(counts.values()):
        notes.append(
            f"Removed: {counts['train_in_test']} rows of train that test holds too "
            f"({counts['train_in_test_exactly']} of them letter for letter), "
            f"{counts['train_in_validation']} of train that validation holds too, "
            f"{counts['validation_in_test']} of validation that test holds too."
        )
    either = [a or b for a, b in zip(in_test, in_validation, strict=True)]
    return {
        "train": _without(examples["train"], either),
        "validation": _without(examples["validation"], validation_in_test),
        "test": examples["test"],
    }


class _Marks(NamedTuple):
    """What makes a row the same as another: its input fields, or what a model reads of them."""

    fields: tuple[str, ...]
    source: str


class _Seen:
    """The rows of a split, to ask whether it holds one."""

    def __init__(self, marks: Iterable[_Marks]) -> None:
        self._fields = {mark.fields for mark in marks}
        self._sources = {mark.source for mark in marks}

    def __contains__(self, mark: _Marks) -> bool:
        return mark.fields in self._fields or mark.source in self._sources


def _without(examples: tuple[Example, ...], taken: Sequence[bool]) -> tuple[Example, ...]:
    return tuple(example for example, gone in zip(examples, taken, strict=True) if not gone)


def _raw(inputs: Sequence[str], row: Row) -> tuple[str, ...]:
    return tuple(str(row.values.get(name, "")) for name in inputs)


def _key(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(normalise(text) for text in texts)


# --- faithful
# ----------------------------------------------------------------------------------------


def _faithful(task: Task, tables: Tables, notes: list[str]) -> Parts:
    rule = task.splits
    if rule is None:
        raise ConfigurationError(
            f"{task.name} has no split rule of the paper. Use the protocol 'clean'."
        )
    if rule.pool is None:
        parts = _as_published(task, tables, rule)
    else:
        pool = _ordered(_published(task, tables, rule, rule.pool), rule)
        used = _used(task, pool, rule.pool, notes)
        shares = rule.shares or (_SHARES if rule.rule == "C" else None)
        parts = _by_shares(used, shares) if shares else _halved(task, tables, rule, pool, used)
    expected = rule.published.get("train", 0)
    if rule.pool != "train" and len(parts["train"]) != expected:
        notes.append(f"Train has {len(parts['train'])} of the {expected} published rows.")
    parts = {name: _used(task, rows, name, notes) for name, rows in parts.items()}
    notes.append(f"Cut by rule {rule.rule} of the paper's scores: " + _sizes(parts) + " rows.")
    return parts


def _as_published(task: Task, tables: Tables, rule: SplitRule) -> Parts:
    return {
        "train": tables.splits.get("train", ()),
        "validation": _published(task, tables, rule, "validation"),
        "test": _published(task, tables, rule, "test"),
    }


def _halved(
    task: Task, tables: Tables, rule: SplitRule, pool: tuple[Row, ...], used: tuple[Row, ...]
) -> Parts:
    taken = {id(row) for row in pool}
    # A source without labelled test rows holds its validation out of train: there they go back.
    rest = [*tables.splits.get("train", ()), *tables.splits.get("validation", ())]
    train = tuple(row for row in rest if id(row) not in taken)
    if not train or any(id(row) in taken for row in tables.splits.get("train", ())):
        raise _lacking(task, tables, rule, "train")
    if rule.sample is not None:
        used = _in_crossfits_order(used)[: int(rule.sample * len(used))]
    half = len(used) // 2
    return {"train": train, "validation": used[:half], "test": used[half:]}


def _by_shares(pool: tuple[Row, ...], shares: tuple[float, float, float]) -> Parts:
    rows = _in_crossfits_order(pool)
    first, second, third = shares
    # Rounded, because 1 - 0.1 - 0.1 is a little less than 0.8.
    ends = (first, round(1 - third - second, 6), round(1 - third, 6))
    train, before, test = (int(end * len(rows)) for end in ends)
    return {"train": rows[:train], "validation": rows[before:test], "test": rows[test:]}


def _in_crossfits_order(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    import numpy

    # CrossFit shuffles a list of rows with numpy's global generator; this is the same permutation.
    order = numpy.random.RandomState(_SHUFFLE_SEED).permutation(len(rows))
    return tuple(rows[int(index)] for index in order)


def _published(task: Task, tables: Tables, rule: SplitRule, name: SplitName) -> tuple[Row, ...]:
    """Returns a published split: a union of the source's splits with just that many rows."""
    count = rule.published.get(name)
    splits = tables.splits
    for union in ((name,), ("test",), ("validation",), ("train", "validation"), _NAMES):
        rows = tuple(row for part in union for row in splits.get(part, ()))
        if len(rows) == count:
            return rows
    raise _lacking(task, tables, rule, name)


def _lacking(task: Task, tables: Tables, rule: SplitRule, name: SplitName) -> DataError:
    found = ", ".join(f"{part} {len(rows)}" for part, rows in tables.splits.items())
    return DataError(
        f"{task.name}: the protocol 'faithful' (rule {rule.rule}) needs the published {name} split "
        "of "
        f"{rule.published.get(name, 0)} rows; {tables.origin} has {found} and cannot give "
        "it. "
        "Use the protocol 'clean', or the hub as the source."
    )


def _ordered(rows: tuple[Row, ...], rule: SplitRule) -> tuple[Row, ...]:
    field = rule.order
    if field is None:
        return rows
    for row in rows:
        if field not in row.values:
            raise DataError(f"{row.where}: {UnknownNameError('column', field, row.values)}")
    return tuple(sorted(rows, key=lambda row: int(row.values[field])))


def _sizes(parts: Mapping[SplitName, Iterable[Row]]) -> str:
    return " / ".join(str(len(tuple(parts[name]))) for name in _NAMES)
