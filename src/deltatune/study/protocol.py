"""How a study was run, and the study itself in the form in which it can be run again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from deltatune.study.cell import Cell, CellResult
from deltatune.study.experiment import Study, Summaries
from deltatune.study.section import Column, Listing, Section, Table, Value
from deltatune.study.summary import Summary

__all__ = ["by_part", "protocol"]

COMMAND = "deltatune study run study.json --out runs/again"
# The grid gives the one, a cell the other.
_OF_CELLS = ("learning_rate", "seed")


def protocol(study: Study, found: Summaries) -> Section:
    """The section of a report that says how its study was run.

    Args:
        study: whose report it is.
        found: what it found.
    """
    text = json.dumps(study.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return Section(
        "How it was run, and how to run it again",
        text=(f"What stands below, kept as study.json, is run again by: {COMMAND}",),
        parts=(_settings(found), _rows(found), _code(found), Listing("study.json", text)),
    )


def by_part(said: Mapping[str, Iterable[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """Yields (name, value): what all parts have in common once, the rest by part.

    Args:
        said: part -> its names and values.
    """
    values: dict[str, dict[str, str]] = {}
    for part, pairs in said.items():
        for name, value in pairs:
            values.setdefault(name, {})[part] = value
    for name, of_parts in values.items():
        if len({*of_parts.values()}) == 1 and len(of_parts) == len(said):
            yield name, next(iter(of_parts.values()))
        else:
            yield name, "; ".join(": ".join(filter(None, pair)) for pair in of_parts.items())


def _settings(found: Summaries) -> Table:
    lines = by_part({part: _said(summary) for part, summary in found.items()})
    columns = (Column("setting"), Column("value"))
    return Table("What its cells have", columns, tuple(lines))


def _said(summary: Summary) -> Iterator[tuple[str, str]]:
    comparison, revisions = summary.comparison, dict[str, set[str]]()
    for cell, _ in summary.final:
        revisions.setdefault(cell.backbone, set()).add(cell.revision or "unknown")
    for backbone, known in revisions.items():
        yield f"{backbone}, which weights", ", ".join(sorted(known))
    settings = comparison.settings.model_dump(mode="json", exclude=set(_OF_CELLS))
    given = {**settings, **comparison.options}
    for name, value in given.items():
        if value not in (None, {}):
            yield name.replace("_", " "), _word(value)
    for method, changed in comparison.by_method.items():
        said = ", ".join(f"{name.replace('_', ' ')} {_word(v)}" for name, v in changed.items())
        yield f"of {method}", said


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _rows(found: Summaries) -> Table:
    """The rows of every task; several lines where parts have other ones."""
    columns = (
        Column("task"),
        Column("version of the record, its digest, that of the rows"),
        *(Column(split, "count") for split in ("train", "validation", "test")),
    )
    lines = dict.fromkeys(
        (cell.task, cell.data or "unknown", *_counts(result)) for cell, result in _results(found)
    )
    return Table("The rows of each task", columns, tuple(lines))


def _counts(result: CellResult) -> tuple[Value, ...]:
    return tuple(result.rows.get(split) for split in ("train", "validation", "test"))


def _code(found: Summaries) -> Table:
    """Which code each arm ran, as `study.source` counts it."""
    lines = dict.fromkeys((str(cell.arm), cell.code) for cell, _ in _results(found))
    return Table("The code that decides results", (Column("arm"), Column("version")), tuple(lines))


def _results(found: Summaries) -> Iterator[tuple[Cell, CellResult]]:
    for summary in found.values():
        yield from ((cell, result) for cell, result in summary.final if result is not None)
