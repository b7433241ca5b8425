"""What holds for a whole comparison, in words: the head of a report."""

from __future__ import annotations

from deltatune.study.cell import CellResult
from deltatune.study.comparison import Comparison
from deltatune.study.select import Grid
from deltatune.study.summary import Summary
from deltatune.training.budget import Nothing

__all__ = ["NOTHING", "counted", "facts"]

NOTHING = str(Nothing())


def facts(summary: Summary) -> list[tuple[str, str]]:
    """Returns (name, value) of what holds for a whole comparison."""
    comparison = summary.comparison
    found = [result for _, result in summary.final if result is not None]
    planned = len(comparison.arms) * len(comparison.tasks) * comparison.seeds
    versions = {name: v for r in found for name, v in r.versions.items()}
    # A chosen cell of the search is a final one too.
    ran = {cell.id: result for cell, result in [*summary.searched, *summary.final]}
    seconds = sum(result.total_seconds for result in ran.values() if result is not None)
    said = [
        ("Budget", _budget_in_words(comparison)),
        ("Seeds", str(comparison.seeds)),
        ("Learning rate", "" if comparison.budget == NOTHING else _rates_in_words(summary)),
        ("Rows", f"protocol {comparison.protocol}"),
        ("Cells", f"{len(found)} of {planned} done, {len(summary.failures)} failed"),
        ("Unavailable", ", ".join(summary.unavailable)),
        ("Time", f"{seconds / 60:.1f} minutes in all"),
        ("Device", "; ".join(sorted({_device(r) for r in found}))),
        ("Versions", ", ".join(f"{name} {v}" for name, v in sorted(versions.items()))),
    ]
    return [(name, value) for name, value in said if value]


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
