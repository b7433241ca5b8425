"""Convergence: how soon a method is near its end, in steps and in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from deltatune.study.cell import Arm, CellResult, Point
from deltatune.study.claim import Claim, Found, everywhere
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.over_tasks import from_highest, in_order, mean, named, over_tasks
from deltatune.study.section import Column, Lines, Section, Series, Table
from deltatune.study.summary import Summary
from deltatune.training.budget import Steps, parse

__all__ = ["EXPERIMENT", "area", "reached", "speed", "with_curve"]

POINTS = 20  # of a curve, where no other distance is asked for
SHARES = (0.9, 0.95, 0.99)


def reached(result: CellResult, share: float, place: Callable[[Point], float]) -> float | None:
    """Where a run first has a share of its best validation score; None without a curve, or where
    its best is not positive.
    """
    points = [(place(p), p.validation) for p in result.curve if p.validation is not None]
    best = max((score for _, score in points), default=0.0)
    return next((x for x, score in points if best > 0 and score >= share * best), None)


def area(result: CellResult) -> float | None:
    """The mean validation score over the evaluations of a run: the area under its curve, as a share
    of the budget. None where it was evaluated once or never.
    """
    scores = [point.validation for point in result.curve if point.validation is not None]
    return fmean(scores) if len(scores) > 1 else None


def with_curve(base: Comparison) -> Comparison:
    """The comparison, evaluated on the way: 20 times, where nothing else is asked for and the
    budget is in steps.
    """
    budget = parse(base.budget)
    if base.settings.evaluation_every is not None or not isinstance(budget, Steps):
        return base
    every = max(1, budget.count // POINTS)
    settings = base.settings.model_copy(update={"evaluation_every": every})
    return base.model_copy(update={"settings": settings})


def _parts(base: Comparison) -> Parts:
    return {"": with_curve(base)}


def _sections(summaries: Summaries) -> list[Section]:
    return [
        _of_backbone(summary, summary.arms(backbone), backbone)
        for summary in summaries.values()
        for backbone in summary.comparison.backbones
    ]


def _of_backbone(summary: Summary, arms: Sequence[Arm], where: str) -> Section:
    columns = [Column("method"), Column("area under the curve", "score")]
    for unit in ("steps", "seconds"):
        columns += [Column(f"{unit} to {100 * share:g} %", "number") for share in SHARES]
    areas = over_tasks(summary, arms, area)
    rows = tuple((str(arm), mean(areas[str(arm)]), *_times(summary, arm)) for arm in arms)
    note = "Medians over tasks and seeds, of the run's own best validation score."
    series = tuple(Series(str(arm), _relative(summary.results(arm))) for arm in arms)
    drawn = tuple(one for one in series if len(one.points) > 1)
    figure = Lines("Share of the best score, mean over tasks", "steps", "share", drawn)
    table = Table("How soon", tuple(columns), rows, note=note)
    return Section(
        f"{where}: convergence",
        "Fig. 1, Extended Data Fig. 1 and 2",
        parts=(table, *([figure] if drawn else [])),
    )


def _times(summary: Summary, arm: Arm) -> list[float | None]:
    places: tuple[Callable[[Point], float], ...] = (lambda p: p.step, lambda p: p.seconds)
    found: list[float | None] = []
    for place in places:
        for share in SHARES:
            known = [reached(result, share, place) for result in summary.results(arm)]
            times = [time for time in known if time is not None]
            found.append(median(times) if times else None)
    return found


def _relative(results: Sequence[CellResult]) -> tuple[tuple[float, float], ...]:
    """Step -> the mean share of its best score that a run has there, where all were evaluated."""
    by_step: dict[int, list[float]] = {}
    for result in results:
        scores = {p.step: p.validation for p in result.curve if p.validation is not None}
        best = max(scores.values(), default=0.0)
        for step, score in scores.items():
            if best > 0:
                by_step.setdefault(step, []).append(score / best)
    most = max(map(len, by_step.values()), default=0)
    return tuple((s, fmean(found)) for s, found in sorted(by_step.items()) if len(found) == most)


def speed(result: CellResult) -> float | None:
    """How soon a run is near its end: the area under its curve as a share of its best score."""
    whole = area(result)
    best = max((p.validation for p in result.curve if p.validation is not None), default=0.0)
    return None if whole is None or best <= 0 else whole / best


def _speeds(summary: Summary, backbone: str) -> Found | None:
    arms = named(summary, backbone, "full", "adapter", "lora", "prefix")
    found = over_tasks(summary, list(arms.values()), speed)
    means = {name: fmean(values) for name, arm in arms.items() if (values := found[str(arm)])}
    if len(means) < 4:
        return None
    here = f"Area under the curve, as a share of a run's best score: {in_order(means)}."
    ordered = from_highest(means)
    return Found(here, ordered[0] == "full" and ordered[-1] == "prefix")


EXPERIMENT = Experiment(
    name="convergence",
    shows="how soon each method is near its end, in steps and in seconds",
    paper="Fig. 1, Extended Data Fig. 1 and 2",
    sections=_sections,
    parts=_parts,
    defaults={"methods": ("prompt", "prefix", "lora", "adapter", "full")},
    claims=(Claim("Convergence is ranked FT > AP ≈ LR > PF.", everywhere(_speeds)),),
)
