"""The table of a comparison, in the form of Table 1 of the paper, as text, Markdown and JSON.

Columns are arms; the first row gives the ratio of tunable parameters, then come the tasks by
category, the average of each category and of all tasks. Where there are many arms they are the
rows of text and Markdown. Scores are times 100, with the sample standard deviation over the seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deltatune.study.summary import Row, Spread, Summary

__all__ = [
    "MANY_ARMS",
    "RATIO",
    "Entry",
    "Layout",
    "arms_are_lines",
    "as_data",
    "as_markdown",
    "as_tables",
    "best_places",
    "layout",
    "missing",
    "percent",
    "remarks",
    "score",
]

RATIO = "Ratio of tunable parameters"
MANY_ARMS = 12  # more do not stand beside each other on a page


def arms_are_lines(arms: int, rows: int) -> bool:
    """Whether so many arms stand below each other, and the rows of tasks and averages beside."""
    return arms > max(MANY_ARMS, rows + 2)


def percent(ratio: float | None) -> str:
    """Writes a ratio with three digits, as a percentage: "0.377%", "100%"."""
    return "-" if ratio is None else f"{100 * ratio:.3g}%"


def score(entry: Spread | None) -> str:
    """Writes scores as "93.35 ±0.21", times 100; "-" where there is none."""
    if entry is None:
        return "-"
    spread = "" if entry.deviation is None else f" ±{100 * entry.deviation:.2f}"
    return f"{100 * entry.mean:.2f}{spread}"


def as_tables(summary: Summary) -> list[RenderableType]:
    """Returns a table for a terminal for each backbone."""
    return [_terminal_table(summary, backbone) for backbone in summary.comparison.backbones]


def as_markdown(summary: Summary) -> str:
    """Returns the tables and what must be said beside them in Markdown."""
    parts = []
    for backbone in summary.comparison.backbones:
        placed = layout(summary, backbone).lines
        header, *body = [[entry.text for entry in line] for line in placed]
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
        parts.append("\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines))
    notes = "\n".join(f"- {remark}" for remark in remarks(summary))
    return "\n\n".join([*parts, notes]).strip() + "\n"


def as_data(summary: Summary) -> dict[str, Any]:
    """Returns everything in the tables as plain values for machines; scores are fractions."""
    return {
        "comparison": summary.comparison.model_dump(mode="json"),
        "tables": {
            backbone: {
                "ratio": {
                    str(arm): summary.mean(arm, lambda result: result.ratio)
                    for arm in summary.arms(backbone)
                },
                "rows": [_row_data(summary, backbone, row) for row in summary.rows(backbone)],
            }
            for backbone in summary.comparison.backbones
        },
        "learning_rates": [
            {
                "backbone": group.arm.backbone,
                "method": str(group.arm),
                "tasks": list(group.tasks),
                "chosen": choice.rate,
                "at_edge": choice.at_edge,
                summary.comparison.selection: {f"{r:g}": mean for r, mean in choice.means.items()},
            }
            for group, choice in summary.choices.items()
        ],
        "unavailable": dict(summary.unavailable),
        "failed": [{"cell": str(f.cell), "error": f.message} for f in summary.failures],
        "remarks": remarks(summary),
    }


def remarks(summary: Summary) -> list[str]:
    """Returns what must be said beside the tables, one sentence each."""
    comparison = summary.comparison
    said = [
        f"Test scores times 100; budget {comparison.budget}, protocol {comparison.protocol},"
        f" {comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}."
        + (" ± is the sample standard deviation over the seeds." if comparison.seeds > 1 else "")
    ]
    if comparison.search_tasks:
        said.append(f"Learning rates were chosen on {', '.join(comparison.search_tasks)}.")
    if summary.pending:
        said.append(f"Not complete: {summary.pending} cells are still to be run.")
    for group, choice in summary.choices.items():
        where = f" on {group.tasks[0]}" if len(group.tasks) < len(comparison.tasks) else ""
        if choice.rate is None:
            said.append(f"{group.arm}{where}: no learning rate ran to its end on every task.")
        elif choice.at_edge:
            said.append(
                f"{group.arm}{where}: the best learning rate, {choice.rate:g}, is at the edge of"
                " its grid; extend the grid."
            )
    for backbone in comparison.backbones:
        said += summary.below_majority(backbone)
    notes = [
        note if note.startswith(f"{cell.task}: ") else f"{cell.task}: {note}"
        for cell, result in summary.final
        if result is not None
        for note in result.notes
    ]
    return [*said, *dict.fromkeys(notes), *missing(summary)]


def missing(summary: Summary) -> list[str]:
    """Returns what has no results, and why, one sentence each."""
    said = [f"{task}: unavailable. {why}" for task, why in summary.unavailable.items()]
    return said + [f"Failed: {f.cell}: {f.message}" for f in summary.failures]


def _lines(summary: Summary, backbone: str) -> list[list[str]]:
    """Returns the table as text: a header line, then the ratio, then the rows."""
    arms = summary.arms(backbone)
    rows = summary.rows(backbone)
    with_majority = any(row.majority is not None for row in rows)
    header = [backbone, "Metric", *(["Commonest label"] if with_majority else []), *map(str, arms)]
    ratios = [percent(summary.mean(arm, lambda result: result.ratio)) for arm in arms]
    lines = [header, [RATIO, *[""] * (len(header) - 1 - len(ratios)), *ratios]]
    for row in rows:
        name = f"{row.name} ({row.remark})" if row.remark else row.name
        majority = "" if row.majority is None else f"{100 * row.majority:.2f}"
        lines.append(
            [name, row.metric, *([majority] if with_majority else []), *map(score, row.entries)]
        )
    return lines


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Attributes:
        text: what stands there.
        best: whether it is the highest score of its row.
        kind: what its row is: "head", "ratio", "task" or "average".
    """

    text: str
    best: bool
    kind: Literal["head", "ratio", "task", "average"]


@dataclass(frozen=True)
class Layout:
    """A table as it is set.

    Attributes:
        lines: the header, then the others; arms are columns, or lines where there are many.
        ends: numbers of the lines below which a rule stands, besides the header's.
    """

    lines: tuple[tuple[Entry, ...], ...]
    ends: frozenset[int]


def layout(summary: Summary, backbone: str) -> Layout:
    """Sets the table of one backbone."""
    texts, rows = _lines(summary, backbone), summary.rows(backbone)
    arms = len(summary.arms(backbone))
    lines = [[Entry(text, False, "head") for text in texts[0]]]
    lines.append([Entry(text, False, "ratio") for text in texts[1]])
    ends = {1}
    for number, (row, line) in enumerate(zip(rows, texts[2:], strict=True), 2):
        best = {place + len(line) - arms for place in best_places(row)}
        kind: Literal["task", "average"] = "task" if row.kind == "task" else "average"
        lines.append([Entry(text, place in best, kind) for place, text in enumerate(line)])
        if row is rows[-1] or rows[number - 1].category != row.category:
            ends.add(number)
    if arms_are_lines(arms, len(rows)):
        # Arms are lines now, behind those of metrics and commonest labels.
        ends = {len(lines[0]) - arms - 1}
        lines = [list(column) for column in zip(*lines, strict=True)]
    return Layout(tuple(map(tuple, lines)), frozenset(ends))


_STYLES = {"head": "", "ratio": "cyan", "task": "", "average": "italic "}


def _terminal_table(summary: Summary, backbone: str) -> Table:
    placed = layout(summary, backbone)
    header, *body = [
        [Text(e.text, style=(_STYLES[e.kind] + ("bold" if e.best else "")).strip()) for e in line]
        for line in placed.lines
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left")
    for number, texts in enumerate(body, 1):
        table.add_row(*texts, end_section=number in placed.ends)
    return table


def best_places(row: Row) -> set[int]:
    """Returns the places of the arms with the highest mean, as it is written; none of one."""
    written = {at: round(100 * e.mean, 2) for at, e in enumerate(row.entries) if e is not None}
    top = max(written.values(), default=0.0)
    return {at for at, mean in written.items() if mean == top and len(written) > 1}


def _row_data(summary: Summary, backbone: str, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "category": row.category,
        "metric": row.metric,
        "remark": row.remark,
        "majority": row.majority,
        "scores": {
            str(arm): None if entry is None else list(entry.values)
            for arm, entry in zip(summary.arms(backbone), row.entries, strict=True)
        },
    }


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
