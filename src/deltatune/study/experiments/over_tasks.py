"""What several experiments look at: arms over the tasks that all of them have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from deltatune.core.grammar import parse
from deltatune.study.cell import Arm, CellResult
from deltatune.study.section import Column, Ranks, Table
from deltatune.study.statistics import critical_distance, interval, mean_ranks, pairs
from deltatune.study.summary import Summary

__all__ = [
    "EVIDENCE",
    "INTERVALS",
    "Measure",
    "differences",
    "from_highest",
    "in_order",
    "in_points",
    "mean",
    "named",
    "only_name",
    "over_tasks",
    "ranks",
    "with_interval",
]

Measure = Callable[[CellResult], float | None]

INTERVALS = "Intervals are of 95 %, by bootstrap over the tasks."
EVIDENCE = (
    f"{INTERVALS} p is of Wilcoxon's signed-rank test over the tasks, with Holm's correction for "
    "all pairs."
)


def over_tasks(
    summary: Summary, arms: Sequence[Arm], measure: Measure = lambda result: result.score
) -> dict[str, list[float]]:
    """Arm -> the mean of a measure over the seeds, for each task that all arms have it on."""
    found = {
        arm: {
            task: [v for v in map(measure, summary.results(arm, task)) if v is not None]
            for task in summary.comparison.tasks
        }
        for arm in arms
    }
    tasks = [t for t in summary.comparison.tasks if all(found[arm][t] for arm in arms)]
    return {str(arm): [fmean(found[arm][task]) for task in tasks] for arm in arms}


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return fmean(values) if values else None


def with_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean, and the ends of its interval."""
    return (fmean(values), *interval(values)) if values else (None, None, None)


def differences(title: str, scores: dict[str, list[float]]) -> Table:
    """Every two arms against each other, over tasks."""
    columns = (
        Column("first"),
        Column("second"),
        Column("first - second", "points"),
        Column("from", "points"),
        Column("to", "points"),
        Column("first better", "count"),
        Column("second better", "count"),
        Column("p", "number"),
    )
    rows = tuple(
        (one.first, one.second, one.difference, one.low, one.high, one.wins, one.losses, one.p)
        for one in pairs(scores)
    )
    return Table(title, columns, rows, note=EVIDENCE)


def ranks(title: str, scores: dict[str, list[float]]) -> Ranks:
    """The mean ranks of arms over tasks."""
    tasks = len(next(iter(scores.values())))
    return Ranks(title, mean_ranks(scores), critical_distance(len(scores), tasks))


def only_name(arm: Arm) -> str | None:
    """The name of an arm's method, without its settings; None of several at once."""
    methods = parse(arm.method).methods
    return methods[0].name if len(methods) == 1 else None


def named(summary: Summary, backbone: str, *names: str) -> dict[str, Arm]:
    """Name -> the first arm of that method alone; of these names, where any are given."""
    found: dict[str, Arm] = {}
    for arm in summary.arms(backbone):
        name = only_name(arm)
        if name is not None and (not names or name in names):
            found.setdefault(name, arm)
    return found


def in_points(values: Sequence[float]) -> str:
    """Writes a mean difference of scores with its interval: "-1.2 (-2.0 to -0.3)"."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * (v or 0) for v in with_interval(values)))


def from_highest(values: Mapping[str, float]) -> list[str]:
    """Names from that of the highest value to that of the lowest."""
    return sorted(values, key=lambda name: -values[name])


def in_order(values: Mapping[str, float]) -> str:
    """Writes scores from the highest: "lora 83.1 > full 82.0"."""
    return " > ".join(f"{name} {100 * values[name]:.1f}" for name in from_highest(values))
