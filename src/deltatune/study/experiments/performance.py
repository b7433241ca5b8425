"""Performance: every method on every task, beside the scores that the paper prints."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from deltatune.core.grammar import parse
from deltatune.study.cell import Arm
from deltatune.study.experiment import Experiment, Summaries
from deltatune.study.experiments.over_tasks import differences, over_tasks, ranks
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.summary import Summary
from deltatune.tasks.reference import table1

__all__ = ["EXPERIMENT", "PRINTED", "paper_averages"]

# Our method -> the column of Table 1 that has it, on T5-base.
PRINTED = {"prompt": "pt_base", "prefix": "pf", "lora": "lr", "adapter": "ap", "full": "ft"}


def paper_averages(column: str) -> dict[str, float]:
    """The averages of a column of Table 1 as its own task rows give them, by category and overall.

    Percentages; categories as `table1.csv` names them, "overall" for all tasks. A task without a
    printed score counts in none.
    """
    by_category: dict[str, list[float]] = {}
    for row in table1():
        if row["kind"] == "task" and row[column]:
            by_category.setdefault(row["category"], []).append(float(row[column]))
    averages = {category: fmean(found) for category, found in by_category.items()}
    return {**averages, "overall": fmean(s for found in by_category.values() for s in found)}


def _sections(summaries: Summaries) -> list[Section]:
    found = []
    for name, summary in summaries.items():
        for backbone in summary.comparison.backbones:
            where = " ".join(filter(None, (backbone, name)))
            found += _of_backbone(summary, summary.arms(backbone), where)
    return found


def _of_backbone(summary: Summary, arms: Sequence[Arm], where: str) -> list[Section]:
    sections = []
    beside = _beside_the_paper(summary, arms)
    if beside is not None:
        sections.append(
            Section(
                f"{where} beside the paper",
                "Table 1",
                ("The paper's scores are of T5-base, 248 million parameters, on the same task.",),
                (beside,),
            )
        )
    scores = over_tasks(summary, arms)
    if len(arms) > 1 and any(scores.values()):
        tested = (differences("Two by two", scores), ranks("Mean ranks over tasks", scores))
        sections.append(Section(f"{where}: which is better", "", (), tested))
    return sections


def _beside_the_paper(summary: Summary, arms: Sequence[Arm]) -> Table | None:
    """Ours and the paper's, for the arms and tasks that both have."""
    columns = {arm: PRINTED[n] for arm in arms if (n := _only_name(arm)) in PRINTED}
    printed = {row["task_id"]: row for row in table1() if row["kind"] == "task"}
    tasks = [task for task in summary.comparison.tasks if task in printed]
    if not columns or not tasks:
        return None
    rows: list[tuple[Value, ...]] = []
    for task in tasks:
        row: list[Value] = [task]
        for arm, column in columns.items():
            theirs = printed[task][column]
            row += [summary.spread(arm, task), float(theirs) / 100 if theirs else None]
        rows.append(tuple(row))
    means = [_mean(column) for column in zip(*(row[1:] for row in rows), strict=True)]
    rows.append((f"Average of {len(tasks)}", *means))
    heads = [
        Column(title, "score")
        for arm in columns
        for title in (str(arm), f"{_only_name(arm)}: paper")
    ]
    return Table(
        "Scores",
        (Column("task"), *heads),
        tuple(rows),
        averages=frozenset({len(rows) - 1}),
        note="An average stands only where every task has a score.",
        best_of="nothing",
    )


def _mean(values: Sequence[Value]) -> Value:
    found = [v if isinstance(v, float) else v.mean for v in values if v and not isinstance(v, str)]
    return fmean(found) if len(found) == len(values) else None


def _only_name(arm: Arm) -> str | None:
    methods = parse(arm.method).methods
    return methods[0].name if len(methods) == 1 else None


EXPERIMENT = Experiment(
    name="performance",
    shows="every method on every task, beside the paper's scores",
    paper="Table 1",
    sections=_sections,
    defaults={"methods": ("prompt", "prefix", "lora", "adapter", "bitfit", "full"), "seeds": 3},
)
