"""The report of a comparison as one self-contained HTML page: no script, no file beside it."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltatune.core.errors import StateError
from deltatune.study.cell import Arm, CellResult, Point
from deltatune.study.figures import Panel, bars, colour, dash, dots, panel
from deltatune.study.summary import Row, Summary
from deltatune.study.table import COSTS, best_places, percent, remarks

__all__ = ["render_page", "write_page"]


def render_page(summary: Summary) -> str:
    """Returns the page. All texts in it are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    comparison = summary.comparison
    return environment.get_template("page.html.j2").render(
        title=f"{_count(comparison.methods, 'method')} on {_count(comparison.tasks, 'task')}",
        subtitle=f"A comparison on {', '.join(comparison.backbones)}, made by deltatune.",
        facts=_facts(summary),
        parts=[_part(summary, backbone) for backbone in comparison.backbones],
        remarks=remarks(summary),
        colour=colour,
        dash=dash,
    )


def write_page(summary: Summary, path: str | os.PathLike[str]) -> Path:
    """Writes the page, whole or not at all. Raises StateError if it cannot be written."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(render_page(summary), encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StateError(
            f"Cannot write the report {target}: {error.strerror}. Give a folder that can be"
            " written."
        ) from error
    return target


def _facts(summary: Summary) -> list[tuple[str, str]]:
    comparison = summary.comparison
    found = [result for _, result in summary.final if result is not None]
    planned = len(comparison.arms) * len(comparison.tasks) * comparison.seeds
    versions = {name: v for r in found for name, v in r.versions.items()}
    # A chosen cell of the search is a final one too.
    ran = {cell.id: result for cell, result in [*summary.searched, *summary.final]}
    seconds = sum(result.total_seconds for result in ran.values() if result is not None)
    facts = [
        ("Budget", f"{comparison.budget}, {comparison.settings.rows_per_step} rows a step"),
        ("Seeds", str(comparison.seeds)),
        ("Learning rate", _rates_in_words(summary)),
        ("Rows", f"protocol {comparison.protocol}"),
        ("Cells", f"{len(found)} of {planned} done, {len(summary.failures)} failed"),
        ("Time", f"{seconds / 60:.1f} minutes in all"),
        ("Device", ", ".join(sorted({r.device for r in found}))),
        ("Versions", ", ".join(f"{name} {v}" for name, v in sorted(versions.items()))),
    ]
    return [(name, value) for name, value in facts if value]


def _count(names: Sequence[str], word: str) -> str:
    return f"{len(names)} {word}{'' if len(names) == 1 else 's'}"


def _rates_in_words(summary: Summary) -> str:
    grid = summary.comparison.grid
    sizes = {len(choice.means) for choice in summary.choices.values()}
    if sizes:
        found = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        where = ", ".join(summary.comparison.search_tasks)
        on = f" of {where}" if where else ""
        return f"{found} values for each arm, the best on validation{on} ({grid})"
    if not grid.relative:
        return f"{grid} for every arm"
    return "the preset of each method" + ("" if grid.values == (1.0,) else f", {grid}")


def _part(summary: Summary, backbone: str) -> dict[str, Any]:
    """Returns what the template needs for one backbone."""
    arms = summary.arms(backbone)
    names = [str(arm) for arm in arms]
    rows = summary.rows(backbone)
    tasks = [row for row in rows if row.kind == "task"]
    return {
        "backbone": backbone,
        "names": names,
        "ratios": [percent(summary.mean(arm, lambda result: result.ratio)) for arm in arms],
        "with_majority": any(row.majority is not None for row in rows),
        "low": bool(summary.below_majority(backbone)),
        "rows": _row_views(rows),
        "dots": dots([(row.name, row.entries, row.majority) for row in tasks], names),
        "evaluated_once": all(
            len(result.curve) < 2 for arm in arms for result in summary.results(arm)
        ),
        "by_step": _convergence(summary, arms, "steps", lambda point: point.step),
        "by_time": _convergence(summary, arms, "seconds", lambda point: point.seconds),
        "costs": [
            figure
            for title, (measure, write) in COSTS.items()
            if (figure := bars(title, {str(a): summary.mean(a, measure) for a in arms}, write))
        ],
        "rates": _rates(summary, backbone),
    }


def _row_views(rows: list[Row]) -> list[dict[str, Any]]:
    views: list[dict[str, Any]] = []
    category = None
    for row in rows:
        best = best_places(row)
        entries = []
        for place, entry in enumerate(row.entries):
            low = entry is not None and row.majority is not None and entry.mean <= row.majority
            style = f"{'best' if place in best else ''} {'low' if low else ''}".strip()
            deviation = None if entry is None else entry.deviation
            entries.append(
                {
                    "mean": "-" if entry is None else f"{100 * entry.mean:.2f}",
                    "deviation": "" if deviation is None else f"{100 * deviation:.2f}",
                    "style": style,
                }
            )
        views.append(
            {
                "kind": row.kind,
                "name": row.name,
                "metric": row.metric,
                "remark": row.remark,
                "majority": "" if row.majority is None else f"{100 * row.majority:.2f}",
                "entries": entries,
                "opens": row.category if row.category != category else "",
            }
        )
        category = row.category
    return views


def _convergence(
    summary: Summary, arms: tuple[Arm, ...], across: str, place: Callable[[Point], float]
) -> list[Panel]:
    numbers = {str(arm): number for number, arm in enumerate(arms)}
    panels = [
        panel(
            task,
            across,
            {str(arm): _mean_curve(summary.results(arm, task), place) for arm in arms},
            numbers=numbers,
        )
        for task in summary.comparison.tasks
    ]
    return [found for found in panels if found is not None]


def _mean_curve(
    results: list[CellResult], place: Callable[[Point], float]
) -> list[tuple[float, float]]:
    """Returns (mean place, mean score) at each step at which every seed was evaluated."""
    by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        for point in result.curve:
            if point.validation is not None:
                by_step[point.step].append((place(point), point.validation))
    return [
        (statistics.fmean(x for x, _ in found), statistics.fmean(y for _, y in found))
        for _, found in sorted(by_step.items())
        if len(found) == len(results)
    ]


def _rates(summary: Summary, backbone: str) -> list[Panel]:
    numbers = {str(arm): number for number, arm in enumerate(summary.arms(backbone))}
    panels = []
    for group, choice in summary.choices.items():
        if group.arm.backbone != backbone:
            continue
        name = str(group.arm)
        where = f", {group.tasks[0]}" if len(group.tasks) < len(summary.comparison.tasks) else ""
        edge = " (at the edge)" if choice.at_edge else ""
        panels.append(
            panel(
                f"{name}{where}{edge}",
                "learning rate",
                {name: list(choice.means.items())},
                numbers=numbers,
                logarithmic=True,
                rings={} if choice.rate is None else {name: choice.rate},
                height=150,
            )
        )
    return [found for found in panels if found is not None]
