"""Transfer: what a delta that was trained on one task does on others, as it is, and how alike the
deltas of two tasks are in themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from statistics import fmean

from deltatune.composition import stored_similarity
from deltatune.core.errors import ConfigurationError
from deltatune.study.cell import Arm
from deltatune.study.claim import Claim, Found
from deltatune.study.comparison import TARGETS, Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.libraries import library
from deltatune.study.section import Column, HeatMap, Section, Table, Value
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT", "alike", "cosines", "relative"]

Matrix = tuple[tuple[float | None, ...], ...]


def relative(summary: Summary, arm: Arm) -> Matrix:
    """A row for each task that was trained on, a column for each that was tested: the score of the
    delta there, as a share of what the delta trained there has. Means over seeds; None where either
    is missing or the latter is not positive.
    """
    tasks = summary.comparison.tasks
    own = {task: summary.spread(arm, task) for task in tasks}
    rows = []
    for source in tasks:
        results, row = summary.results(arm, source), list[float | None]()
        for target in tasks:
            there = [r.measured[f"on {target}"] for r in results if f"on {target}" in r.measured]
            original = own[target]
            known = there and original is not None and original.mean > 0
            row.append(fmean(there) / original.mean if known and original is not None else None)
        rows.append(tuple(row))
    return tuple(rows)


def cosines(summary: Summary, arm: Arm) -> Matrix:
    """How alike the deltas of two tasks are, by `composition.stored_similarity`: the mean over the
    seeds that both have. None where no two folders are here, or the method has no such measure.
    """
    tasks = summary.comparison.tasks
    here = {at: kept for at, kept in _folders(summary, arm).items() if Path(kept).is_dir()}
    found: dict[tuple[int, int], float | None] = {}
    for i, j in combinations_with_replacement(range(len(tasks)), 2):
        pairs = [
            (here[tasks[i], seed], here[tasks[j], seed])
            for seed in range(summary.comparison.seeds)
            if (tasks[i], seed) in here and (tasks[j], seed) in here
        ]
        values = [value for a, b in pairs if (value := stored_similarity(a, b)) is not None]
        found[i, j] = found[j, i] = fmean(values) if values else None
    every = range(len(tasks))
    return tuple(tuple(found[i, j] for j in every) for i in every)


def _folders(summary: Summary, arm: Arm) -> dict[tuple[str, int], str]:
    """(task, seed) -> the folder in which its delta was kept."""
    return {
        (cell.task, cell.seed): result.artefact
        for cell, result in summary.final
        if cell.arm == arm and result is not None and result.artefact is not None
    }


def alike(matrix: Matrix) -> list[int]:
    """An order of the tasks in which those that do for each other stand together.

    Average-linkage clustering; two tasks are as far apart as their transfer, both ways in the mean,
    falls short of 1. Tasks with missing values keep their order.
    """
    count = len(matrix)
    if count < 3 or any(value is None for row in matrix for value in row):
        return list(range(count))
    hierarchy = library("scipy.cluster.hierarchy")
    distances = [
        1 - min(1.0, (float(matrix[i][j] or 0) + float(matrix[j][i] or 0)) / 2)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    return [int(k) for k in hierarchy.leaves_list(hierarchy.linkage(distances, "average"))]


def _parts(base: Comparison) -> Parts:
    if len(base.tasks) < 2:
        raise ConfigurationError(
            f"Transfer is between at least 2 tasks; found {', '.join(base.tasks)}."
        )
    options = {**base.options, TARGETS: " + ".join(base.tasks)}
    return {"": base.model_copy(update={"options": options})}


def _sections(summaries: Summaries) -> list[Section]:
    return [
        _section(summary, arm)
        for summary in summaries.values()
        for backbone in summary.comparison.backbones
        for arm in summary.arms(backbone)
    ]


def _section(summary: Summary, arm: Arm) -> Section:
    matrix, tasks = relative(summary, arm), summary.comparison.tasks
    order = alike(matrix)
    names = tuple(tasks[k] for k in order)
    figure = HeatMap(
        "Score of the delta of a row on the task of a column, over that of its own delta",
        names,
        names,
        tuple(tuple(matrix[i][j] for j in order) for i in order),
    )
    figures, own = [figure], cosines(summary, arm)
    if any(value is not None for row in own for value in row):
        title = "Cosine between the deltas of two tasks, of effective weights or of mean tokens"
        shown = tuple(tuple(own[i][j] for j in order) for i in order)
        figures.append(HeatMap(title, names, names, shown))
    columns = (
        Column("task"),
        Column("commonest label", "score"),
        Column("its own delta", "score"),
        Column("best other"),
        Column("its share", "percent"),
    )
    rows: list[tuple[Value, ...]] = []
    for j, target in enumerate(tasks):
        shares = {tasks[i]: v for i in range(len(tasks)) if i != j and (v := matrix[i][j])}
        best = max(shares, key=lambda name: shares[name], default=None)
        majority = next((r.majority for r in summary.results(arm, target)), None)
        reached = summary.spread(arm, target)
        rows.append((target, majority, reached, best, None if best is None else shares[best]))
    away = [kept for kept in _folders(summary, arm).values() if not Path(kept).is_dir()]
    return Section(
        f"{arm.backbone}, {arm}: transfer",
        "Extended Data Fig. 5",
        (
            "Tasks that do for each other stand together. A share near that of the commonest label "
            "means that nothing was carried over.",
            *(_not_found(away) if away else ()),
        ),
        (*figures, Table("From the best other task", columns, tuple(rows))),
    )


def _not_found(away: list[str]) -> tuple[str, ...]:
    return (
        f"Deltas that are not where they were kept count in no cosine: {len(away)}, the first "
        f"{away[0]}. Write the report from the folder that this is relative to.",
    )


def _kin(summaries: Summaries) -> Mapping[str, Found]:
    """What is carried to tasks of the same category, and to those of others."""
    found = {}
    for summary in summaries.values():
        tasks = summary.comparison.tasks
        category = {c.task: r.category for c, r in summary.final if r is not None}
        for arm in (arm for b in summary.comparison.backbones for arm in summary.arms(b)):
            matrix = relative(summary, arm)
            shares: dict[bool, list[float]] = {True: [], False: []}
            for i, j in permutations(range(len(tasks)), 2):
                if (share := matrix[i][j]) is not None:
                    shares[category[tasks[i]] == category[tasks[j]]].append(share)
            if all(shares.values()):
                near, far = fmean(shares[True]), fmean(shares[False])
                here = f"{near:.0%} of the own score within a category, {far:.0%} across."
                found[f"{arm.backbone}, {arm}"] = Found(here, near > far)
    return found


EXPERIMENT = Experiment(
    name="transfer",
    shows="what a delta trained on one task does on others, as it is",
    paper="Extended Data Fig. 5",
    sections=_sections,
    parts=_parts,
    defaults={"methods": ("prompt", "prefix", "adapter", "lora")},
    claims=(
        Claim("Transfer between tasks of one category does well, between others poorly.", _kin),
    ),
)
