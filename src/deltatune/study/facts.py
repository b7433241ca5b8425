"""What holds for a whole comparison, in words: the head of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deltatune.study.cell import CellResult
from deltatune.study.comparison import Comparison
from deltatune.study.protocol import by_part
from deltatune.study.select import Grid
from deltatune.study.summary import Summary
from deltatune.training.budget import Nothing

__all__ = ["NOTHING", "counted", "facts"]

NOTHING = str(Nothing())


def facts(parts: Mapping[str, Summary]) -> list[tuple[str, str]]:
    """Returns (name, value) of what holds for a whole study.

    Args:
        parts: its comparisons by name; one alone has none.
    """
    cells = {
        cell.id: result
        for summary in parts.values()
        # A chosen cell of the search is a final one too.
        for cell, result in [*summary.searched, *summary.final]
    }
    found = [result for result in cells.values() if result is not None]
    planned = sum(
        len(one.arms) * len(one.tasks) * one.seeds
        for one in (summary.comparison for summary in parts.values())
    )
    final = sum(r is not None for summary in parts.values() for _, r in summary.final)
    failed = len({one.id for summary in parts.values() for one in summary.failures})
    versions = {name: v for result in found for name, v in result.versions.items()}
    seconds = sum(result.total_seconds for result in found)
    said = [
        *by_part({part: _asked(summary) for part, summary in parts.items()}),
        ("Cells", f"{final} of {planned} done, {failed} failed"),
        ("Time", f"{seconds / 60:.1f} minutes in all"),
        ("Device", "; ".join(sorted({_device(result) for result in found}))),
        ("Versions", ", ".join(f"{name} {v}" for name, v in sorted(versions.items()))),
    ]
    return [(name, value) for name, value in said if value]


def _asked(summary: Summary) -> Iterator[tuple[str, str]]:
    comparison = summary.comparison
    yield "Budget", _budget_in_words(comparison)
    yield "Seeds", str(comparison.seeds)
    if comparison.budget != NOTHING:
        yield "Learning rate", _rates_in_words(summary)
    yield "Rows", f"protocol {comparison.protocol}"
    if summary.unavailable:
        yield "Unavailable", ", ".join(summary.unavailable)


def _device(result: CellResult) -> str:
    return ", ".join(filter(None, (result.device, result.machine)))


def _budget_in_words(comparison: Comparison) -> str:
    if comparison.budget == NOTHING:
        return "nothing is trained"
    return f"{comparison.budget}, {comparison.settings.rows_per_step} rows a step"


def _rates_in_words(summary: Summary) -> str:
    grid = summary.comparison.grid
    sizes = {len(choice.means) for choice in summary.choices.values()}
    if sizes:
        found = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        where = ", ".join(summary.comparison.search_tasks)
        on = f" of {where}" if where else ""
        return (
            f"{found} values for each arm, the best on {summary.comparison.selection}{on} ({grid})"
        )
    if not grid.relative:
        return f"{grid} for every arm"
    return "the preset of each method" + ("" if grid == Grid() else f", {grid}")


def counted(number: int, word: str) -> str:
    """Writes a number of things: "1 task", "2 tasks"."""
    return f"{number} {word}{'' if number == 1 else 's'}"
