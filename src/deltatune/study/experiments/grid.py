"""Grid: any backbones, methods, tasks and seeds, by several protocols and for several budgets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deltatune.core.errors import ConfigurationError
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import GRID, Experiment, Parts, Study, Summaries
from deltatune.study.experiments.over_tasks import INTERVALS, with_interval
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT", "crossed"]


def crossed(base: Comparison, protocols: Sequence[str], budgets: Sequence[str]) -> Study:
    """The study of a comparison by every protocol and for every budget.

    Raises ConfigurationError if one stands twice.
    """
    for names in (protocols, budgets):
        if len({*names}) < len(names):
            raise ConfigurationError(f"One of {', '.join(names)} stands twice. Name each once.")
    parts: Parts = {}
    for protocol, budget in itertools.product(
        protocols or (base.protocol,), budgets or (base.budget,)
    ):
        part = Comparison(**{**dict(base), "protocol": protocol, "budget": budget})
        parts[f"{protocol}, {part.budget}"] = part
    return Study(experiment=GRID, parts=parts)


def _sections(summaries: Summaries) -> list[Section]:
    """What differs between protocols, where there are several; the parts speak for themselves."""
    found = []
    for one, other in itertools.combinations(summaries.values(), 2):
        first, second = one.comparison, other.comparison
        if first.protocol == second.protocol or first.budget != second.budget:
            continue
        found += [
            Section(
                f"{backbone}: {first.protocol} against {second.protocol}, {first.budget}",
                text=("How rows are split decides this much, beyond what a method does.",),
                parts=(_differences(one, other, backbone),),
            )
            for backbone in first.backbones
        ]
    return found


def _differences(one: Summary, other: Summary, backbone: str) -> Table:
    columns = (
        Column("method"),
        Column(one.comparison.protocol, "score"),
        Column(other.comparison.protocol, "score"),
        Column("difference", "points"),
        Column("from", "points"),
        Column("to", "points"),
    )
    rows: list[tuple[Value, ...]] = []
    for arm in one.arms(backbone):
        tasks = [
            task
            for task in one.comparison.tasks
            if one.spread(arm, task) is not None and other.spread(arm, task) is not None
        ]
        means = [
            [s.mean for task in tasks if (s := summary.spread(arm, task)) is not None]
            for summary in (one, other)
        ]
        gaps = [a - b for a, b in zip(*means, strict=True)]
        whole = [sum(mean) / len(mean) if mean else None for mean in means]
        rows.append((str(arm), *whole, *with_interval(gaps)))
    return Table("Means over tasks", columns, tuple(rows), note=INTERVALS)


EXPERIMENT = Experiment(
    name=GRID,
    shows="any backbones, methods, tasks and seeds, by several protocols and for several budgets",
    paper="",
    sections=_sections,
)
