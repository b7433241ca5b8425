"""Sequence: the same deltas trained one after the other, in every order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean

from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import parse
from deltatune.study.cell import Arm, CellResult
from deltatune.study.claim import Claim, Found, everywhere
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.section import Column, Lines, Section, Series, Table, Value
from deltatune.study.summary import Summary
from deltatune.training.budget import Steps
from deltatune.training.budget import parse as parse_budget

__all__ = ["EXPERIMENT"]

POINTS = 10  # of the curve of a stage, where no other distance is asked for


def _parts(base: Comparison) -> Parts:
    budget = parse_budget(base.budget)
    if len(base.methods) < 2 or not isinstance(budget, Steps):
        raise ConfigurationError(
            "A sequence is of at least 2 methods, each with a budget in steps; found "
            f"{', '.join(base.methods)} for {budget}."
        )
    orders = itertools.permutations(base.methods)
    changes: dict[str, object] = {"methods": tuple(str(parse(" >> ".join(o))) for o in orders)}
    if base.settings.evaluation_every is None:
        every = max(1, budget.count // POINTS)
        changes["settings"] = base.settings.model_copy(update={"evaluation_every": every})
    return {"": base.model_copy(update=changes)}


def _sections(summaries: Summaries) -> list[Section]:
    return [
        _section(summary, summary.arms(backbone), backbone)
        for summary in summaries.values()
        for backbone in summary.comparison.backbones
    ]


def _section(summary: Summary, arms: Sequence[Arm], where: str) -> Section:
    stages = len(parse(arms[0].method).stages)
    length = _steps(summary)
    ends = [(number + 1) * length for number in range(stages)]
    columns = (
        Column("order"),
        *(Column(f"after stage {number + 1}", "score") for number in range(stages)),
        Column("test", "score"),
    )
    rows: list[tuple[Value, ...]] = []
    for arm in arms:
        results = summary.results(arm)
        scores = [_mean([_at(result, end) for result in results]) for end in ends]
        rows.append((_order(arm), *scores, _mean([result.score for result in results])))
    lines = tuple(Series(_order(arm), _curve(summary.results(arm))) for arm in arms)
    drawn = tuple(line for line in lines if len(line.points) > 1)
    figure = Lines("Through the stages, mean over tasks and seeds", "steps", "validation", drawn)
    note = "Stages are scored on validation rows; the best of each stage in bold."
    table = Table("Every order", columns, tuple(rows), note=note, best_of="column")
    return Section(
        f"{where}: one after the other",
        "Extended Data Fig. 4",
        (
            "Each stage has its own optimiser and schedule; earlier stages stay as they are, and "
            "later ones are absent until their turn.",
        ),
        (table, *([figure] if drawn else [])),
    )


def _steps(summary: Summary) -> int:
    budget = parse_budget(summary.comparison.budget)
    return budget.count if isinstance(budget, Steps) else 0


def _at(result: CellResult, step: int) -> float | None:
    """The validation score after a step."""
    return next((p.validation for p in result.curve if p.step == step), None)


def _curve(results: Sequence[CellResult]) -> tuple[tuple[float, float], ...]:
    steps = sorted({p.step for result in results for p in result.curve})
    found = [(float(step), _mean([_at(result, step) for result in results])) for step in steps]
    return tuple((step, 100 * score) for step, score in found if score is not None)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None unless all are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _order(arm: Arm) -> str:
    expression = parse(arm.method)
    stages = map(expression.of_stage, range(len(expression.stages)))
    return " > ".join(" + ".join(method.name for method in stage) for stage in stages)


def _later_help(summary: Summary, backbone: str) -> Found | None:
    length, gains = _steps(summary), list[float]()
    for arm in summary.arms(backbone):
        ends = [(n + 1) * length for n in range(len(parse(arm.method).stages))]
        for task in summary.comparison.tasks:
            results = summary.results(arm, task)
            scores = [_mean([_at(result, end) for result in results]) for end in ends]
            steps = itertools.pairwise(scores)
            gains += [b - a for a, b in steps if a is not None and b is not None]
    if not gains:
        return None
    raised = sum(gain > 0 for gain in gains)
    here = (
        f"The validation score rises in {raised} of {len(gains)} later stages, by "
        f"{100 * fmean(gains):+.1f} points in the mean of all."
    )
    return Found(here, raised > 0)


def _no_best_order(summary: Summary, backbone: str) -> Found | None:
    best: dict[str, str] = {}
    for task in summary.comparison.tasks:
        means = {
            _order(arm): found.mean
            for arm in summary.arms(backbone)
            if (found := summary.spread(arm, task)) is not None
        }
        if means:
            best[task] = max(means, key=means.__getitem__)
    if len(best) < 2:
        return None
    here = "; ".join(f"{task}: {order}" for task, order in best.items())
    return Found(f"The best order on each task: {here}.", len(set(best.values())) > 1)


EXPERIMENT = Experiment(
    name="sequence",
    shows="the same deltas one after the other, in every order",
    paper="Extended Data Fig. 4",
    sections=_sections,
    parts=_parts,
    defaults={"methods": ("prompt", "bitfit", "adapter"), "budget": "200 steps"},
    claims=(
        Claim("Under certain cases later deltas improve performance.", everywhere(_later_help)),
        Claim("No order is the best under all settings.", everywhere(_no_best_order)),
    ),
)
