"""The report of a comparison: what a summary says, as sections of a page."""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltatune.study.cell import Arm, CellResult, Point
from deltatune.study.experiment import GRID, Study
from deltatune.study.facts import counted, facts
from deltatune.study.protocol import protocol
from deltatune.study.report import render, write
from deltatune.study.section import (
    Bars,
    Column,
    Figure,
    HeatMap,
    Lines,
    Place,
    Scatter,
    Section,
    Series,
    Table,
    Value,
    number_of,
)
from deltatune.study.summary import Row, Spread, Summary
from deltatune.study.table import MANY_ARMS, RATIO, arms_are_lines, percent, remarks

__all__ = ["render_page", "sections", "write_page"]

Parts = tuple[Table | Figure, ...]
Measure = Callable[[CellResult], float | None]


def _milliseconds(result: CellResult) -> float | None:
    return 1000 * result.seconds / result.steps if result.steps else None


def _megabytes(result: CellResult) -> float | None:
    return None if result.memory is None else result.memory / 2**20


# What an arm costs: its column, and how to measure it on a result.
COSTS: tuple[tuple[Column, Measure], ...] = (
    (Column("Time per step, ms", "number"), _milliseconds),
    (Column("Training time, s", "number"), lambda result: result.seconds),
    (Column("Peak memory, MiB", "number"), _megabytes),
    (Column("Tuned parameters", "count"), lambda result: float(result.trainable)),
)


def render_page(summary: Summary) -> str:
    """Returns the page. All texts in it are escaped. Raises UnsupportedError: no matplotlib."""
    return render(*_heading(summary), facts({"": summary}), _whole(summary))


def write_page(summary: Summary, path: str | os.PathLike[str]) -> Path:
    """Writes the page, whole or not at all.

    Raises:
        StateError: it cannot be written.
        UnsupportedError: matplotlib is missing.
    """
    return write(path, *_heading(summary), facts({"": summary}), _whole(summary))


def sections(summary: Summary) -> list[Section]:
    """Returns what a comparison says: for each backbone its scores, curves, costs and rates."""
    found = []
    for backbone in summary.comparison.backbones:
        found += [_scores(summary, backbone), _convergence(summary, backbone)]
        found += [_costs(summary, backbone), *_rates(summary, backbone)]
    return [*found, Section("To be read with the numbers", text=tuple(remarks(summary)))]


def _whole(summary: Summary) -> list[Section]:
    """The sections of a comparison that is no part of a study, and how it was run."""
    study = Study(experiment=GRID, parts={"": summary.asked})
    return [*sections(summary), protocol(study, {"": summary})]


def _heading(summary: Summary) -> tuple[str, str]:
    comparison = summary.comparison
    title = (
        f"{counted(len(comparison.methods), 'method')} on {counted(len(comparison.tasks), 'task')}"
    )
    return title, f"A comparison on {', '.join(comparison.backbones)}, made by deltatune."


def _scores(summary: Summary, backbone: str) -> Section:
    arms, rows = summary.arms(backbone), summary.rows(backbone)
    note = "Test rows, times 100; the best of a task in bold."
    if low := len(summary.below_majority(backbone)):
        note += f" {counted(low, 'score')} not above the commonest label: see the end."
    arrange = _by_arm if arms_are_lines(len(arms), len(rows)) else _by_task
    parts: Parts = (arrange(summary, arms, rows, note), *_distances(arms, rows))
    return Section(f"Scores on {backbone}", paper="Table 1", parts=parts)


def _by_task(summary: Summary, arms: Sequence[Arm], rows: Sequence[Row], note: str) -> Table:
    with_majority = any(row.majority is not None for row in rows)
    columns = [Column("Task"), Column("Category"), Column("Metric")]
    columns += [Column("Commonest label", "number")] if with_majority else []
    blanks: list[Value] = ["", "", *([None] if with_majority else [])]
    ratios = [percent(summary.mean(arm, lambda result: result.ratio)) for arm in arms]
    lines: list[tuple[Value, ...]] = [(RATIO, *blanks, *ratios)]
    for row in rows:
        majority = None if row.majority is None else 100 * row.majority
        beside = [majority] if with_majority else []
        lines.append((_named(row), row.category, row.metric, *beside, *row.entries))
    return Table(
        "Scores by task",
        (*columns, *(Column(str(arm), "score") for arm in arms)),
        tuple(lines),
        averages=frozenset([0, *(n for n, row in enumerate(rows, 1) if row.kind != "task")]),
        note=note,
        best_of="row",
    )


def _by_arm(summary: Summary, arms: Sequence[Arm], rows: Sequence[Row], note: str) -> Table:
    titles = [f"{_named(row)}, {row.metric}" if row.metric else row.name for row in rows]
    columns = (Column("Arm"), *(Column(title, "score") for title in titles))
    lines: list[tuple[Value, ...]] = [
        (str(arm), *(row.entries[place] for row in rows), summary.mean(arm, lambda r: r.ratio))
        for place, arm in enumerate(arms)
    ]
    if known := [row for row in rows if row.majority is not None]:
        lines.append(("Commonest label", *(r.majority if r in known else None for r in rows), None))
    return Table(
        "Scores by arm",
        (*columns, Column(RATIO, "percent")),
        tuple(lines),
        averages=frozenset(range(len(arms), len(lines))),
        note=note,
        best_of="column",
    )


def _named(row: Row) -> str:
    return f"{row.name} ({row.remark})" if row.remark else row.name


def _distances(arms: Sequence[Arm], rows: Sequence[Row]) -> list[HeatMap]:
    """Returns how far each arm stays below the best of each task, where there is a choice."""
    tasks = [row for row in rows if row.kind == "task"]
    values = []
    for row in tasks:
        means = [None if entry is None else entry.mean for entry in row.entries]
        top = max((m for m in means if m is not None and math.isfinite(m)), default=math.nan)
        values.append(tuple(None if m is None else round(100 * (m - top), 2) for m in means))
    if len(arms) < 2 or not any(v is not None and math.isfinite(v) for row in values for v in row):
        return []
    title, names = "Points below the best of each task", tuple(map(str, arms))
    labels = tuple(row.name for row in tasks)
    if arms_are_lines(len(arms), len(rows)):
        return [HeatMap(title, names, labels, tuple(zip(*values, strict=True)))]
    return [HeatMap(title, labels, names, tuple(values))]


def _drawn(summary: Summary, backbone: str) -> tuple[tuple[Arm, ...], tuple[str, ...]]:
    """Returns the arms that figures show, and what is to be said of it: all, or, of more than can
    be told apart, those of the highest mean score.
    """
    arms, tasks = summary.arms(backbone), summary.comparison.tasks
    if len(arms) <= MANY_ARMS:
        return arms, ()
    means = {arm: number_of(summary.average(arm, tasks)) for arm in arms}
    ranked = sorted(arms, key=lambda arm: -math.inf if (m := means[arm]) is None else m)
    best = set(ranked[-MANY_ARMS:])
    said = f"Figures of lines and bars show the {MANY_ARMS} arms of the highest mean score."
    return tuple(arm for arm in arms if arm in best), (said,)


_MOST_CURVES = 12  # tasks that have figures of their own


def _convergence(summary: Summary, backbone: str) -> Section:
    title, (arms, said) = f"Convergence on {backbone}", _drawn(summary, backbone)
    if all(len(result.curve) < 2 for arm in arms for result in summary.results(arm)):
        once = "Each run was evaluated once, at its end. With settings.evaluation_every curves"
        return Section(title, text=(f"{once} stand here.",))
    axes: dict[str, Callable[[Point], float]] = {
        "steps": lambda point: point.step,
        "seconds": lambda point: point.seconds,
    }
    tasks, spread = summary.comparison.tasks, summary.comparison.seeds > 1
    shown: dict[str, str | None] = {task: task for task in tasks}
    text = "Score on the validation rows, times 100, mean over the seeds"
    if len(tasks) > _MOST_CURVES:  # pages of figures that nobody looks at
        shown, spread = {f"Mean over {len(tasks)} tasks": None}, False
        text += " and the tasks; that of each is in `deltatune study query`"
    figures = [
        Lines(
            f"{name}, by {across}",
            across,
            "validation score",
            tuple(_mean_curve(str(arm), summary.results(arm, task), place, spread) for arm in arms),
        )
        for name, task in shown.items()
        for across, place in axes.items()
    ]
    text += ", from the lowest to the highest of them." if spread else "."
    return Section(title, text=(text, *said), parts=tuple(f for f in figures if _has_points(f)))


def _has_points(figure: Lines) -> bool:
    return any(series.points for series in figure.series)


def _mean_curve(
    name: str, results: list[CellResult], place: Callable[[Point], float], spread: bool
) -> Series:
    """Returns mean places and scores at each step at which every run was evaluated."""
    by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        for point in result.curve:
            if point.validation is not None:
                by_step[point.step].append((place(point), 100 * point.validation))
    complete = [found for _, found in sorted(by_step.items()) if len(found) == len(results)]
    points = [tuple(map(statistics.fmean, zip(*found, strict=True))) for found in complete]
    scores = [[score for _, score in found] for found in complete]
    return Series(
        name,
        tuple((x, y) for x, y in points),
        band=tuple((min(s), max(s)) for s in scores) if spread and len(results) > 1 else (),
    )


def _costs(summary: Summary, backbone: str) -> Section:
    arms, (drawn, said) = summary.arms(backbone), _drawn(summary, backbone)
    means = {arm: summary.average(arm, summary.comparison.tasks) for arm in arms}
    costs = [
        (column, {arm: summary.mean(arm, measure) for arm in arms}) for column, measure in COSTS
    ]
    measured = [(column, by_arm) for column, by_arm in costs if any(by_arm.values())]
    columns = (Column("Arm"), Column("Mean score", "score"), Column(RATIO, "percent"))
    rows = tuple(
        (
            str(arm),
            means[arm],
            summary.mean(arm, lambda result: result.ratio),
            *(by_arm[arm] for _, by_arm in measured),
        )
        for arm in arms
    )
    title = "Mean score over the tasks, and what it costs"
    table = Table(title, (*columns, *(column for column, _ in measured)), rows)
    clouds, bars = list[Scatter](), list[Bars]()
    for column, by_arm in measured:
        if column.title != "Time per step, ms":  # says what training says
            clouds.append(_cloud(column, by_arm, means))
        heights = {str(a): {column.title: x} for a in drawn if (x := by_arm[a]) is not None}
        bars.append(Bars(column.title, column.title, heights))
    several: Parts = (
        *(cloud for cloud in clouds if len(cloud.places) > 1),
        *(one for one in bars if len(one.bars) > 1),
    )
    text = (
        "Means over tasks and seeds. Time is that of training alone, without evaluation.",
        "Filled points, joined by a line, are the Pareto front: nothing that costs less scores"
        " as high.",
        *said,
    )
    return Section(f"Cost on {backbone}", text=text, parts=(table, *several))


def _cloud(
    column: Column, by_arm: Mapping[Arm, float | None], means: Mapping[Arm, Spread | None]
) -> Scatter:
    """Mean scores against a cost, of the arms that have both."""
    places = tuple(
        Place(str(arm), x, 100 * mean.mean)
        for arm, x in by_arm.items()
        if x is not None and (mean := means[arm]) is not None and math.isfinite(mean.mean)
    )
    title = f"Score against {column.title.partition(',')[0].lower()}"
    axes = (column.title, "mean score over the tasks")
    return Scatter(title, *axes, places, column.kind == "count")


def _rates(summary: Summary, backbone: str) -> list[Section]:
    """Returns what was tried to find the learning rates; nothing where nothing was."""
    found = [(g, choice) for g, choice in summary.choices.items() if g.arm.backbone == backbone]
    if not found:
        return []
    whole, on = len(summary.comparison.tasks), summary.comparison.selection
    drawn, said = _drawn(summary, backbone)
    places = dict.fromkeys(group.tasks for group, _ in found)
    rows: list[tuple[Value, ...]] = []
    curves: dict[tuple[str, ...], list[Series]] = {tasks: [] for tasks in places}
    for group, choice in found:
        tasks = "all" if len(group.tasks) == whole else group.tasks[0]
        score = None if choice.rate is None else choice.means[choice.rate]
        tried = float(len(choice.means))
        edge = "at the edge" if choice.at_edge else ""
        rows.append((str(group.arm), tasks, tried, choice.rate, score, edge))
        if group.arm not in drawn:
            continue
        points = [(r, 100 * mean) for r, mean in choice.means.items() if math.isfinite(mean)]
        ring = frozenset(n for n, (rate, _) in enumerate(points) if rate == choice.rate)
        curves[group.tasks].append(Series(str(group.arm), tuple(points), ringed=ring))
    columns = (
        Column("Arm"),
        Column("Tasks"),
        Column("Rates tried", "count"),
        Column("Chosen", "number"),
        Column(f"{on.title()} score", "score"),
        Column("Of its grid"),
    )
    figures = [
        _by_rate(series, on, "" if len(tasks) == whole else f", {tasks[0]}")
        for tasks, series in curves.items()
    ]
    text = (
        f"Mean score on the {on} rows, times 100, for each learning rate that was tried; a ring is"
        " around the one chosen."
        + (" Test rows had no say." if on == "validation" else " They are the rows reported."),
        *said,
    )
    parts: Parts = (Table("Learning rates", columns, tuple(rows)), *filter(_has_points, figures))
    return [Section(f"Learning rates on {backbone}", text=text, parts=parts)]


def _by_rate(series: Sequence[Series], on: str, where: str) -> Lines:
    return Lines(
        f"{on.title()} score by learning rate{where}",
        "learning rate",
        f"mean {on} score",
        tuple(series),
        logarithmic=True,
    )
