"""What a store says of a comparison, in the order in which people read it: tasks by arms."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from deltatune.core.errors import StateError
from deltatune.study.cell import Arm, Cell, CellResult
from deltatune.study.comparison import NOTE, UNAVAILABLE, Comparison, Group
from deltatune.study.select import Choice, choose
from deltatune.study.store import Failed, Store

__all__ = ["Row", "Spread", "Summary", "summarise"]


@dataclass(frozen=True)
class Spread:
    """The values of one quantity over the seeds.

    Attributes:
        values: in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation (n - 1); None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        kind: "task", "average" (of a category) or "overall".
        name: of the task, or "Average of ...".
        category: the row stands under.
        metric: of a task, else "".
        remark: what must stand beside the scores ("proxy", "partial", few test rows), or "".
        entries: a score for each arm of the table, fractions; None where there is none.
        majority: score of always giving the commonest label; None where that has no meaning.
    """

    kind: str
    name: str
    category: str
    entries: tuple[Spread | None, ...]
    metric: str = ""
    remark: str = ""
    majority: float | None = None


@dataclass(frozen=True)
class Summary:
    """A comparison with all that its store knows of it.

    Attributes:
        asked: what was to be compared.
        final: the cells of the table with their results, None where there is none yet.
        searched: the cells of the grids with their results.
        failures: what went wrong with cells of either kind.
        pending: how many of the cells planned so far have not been run yet.
        unavailable: the tasks whose rows could not be had -> why.
    """

    asked: Comparison
    final: tuple[tuple[Cell, CellResult | None], ...]
    searched: tuple[tuple[Cell, CellResult | None], ...]
    failures: tuple[Failed, ...]
    pending: int = 0
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def comparison(self) -> Comparison:
        """What was compared: on the tasks whose rows could be had."""
        return self.asked.without(self.unavailable)

    def results(self, arm: Arm, task: str | None = None) -> list[CellResult]:
        """Returns the results of an arm, on one task or on all."""
        return [
            result
            for cell, result in self.final
            if result is not None and cell.arm == arm and task in (None, cell.task)
        ]

    def spread(self, arm: Arm, task: str) -> Spread | None:
        """Returns the scores of an arm on a task over the seeds."""
        values = tuple(result.score for result in self.results(arm, task))
        return Spread(values) if values else None

    def average(self, arm: Arm, tasks: Sequence[str]) -> Spread | None:
        """Returns the unweighted mean over tasks, seed by seed; None if a task has no score.

        Only seeds that every task has been run with count.
        """
        by_seed: dict[int, list[float]] = defaultdict(list)
        for cell, result in self.final:
            if result is not None and cell.arm == arm and cell.task in tasks:
                by_seed[cell.seed].append(result.score)
        complete = [scores for _, scores in sorted(by_seed.items()) if len(scores) == len(tasks)]
        return Spread(tuple(statistics.fmean(scores) for scores in complete)) if complete else None

    def mean(self, arm: Arm, value: Callable[[CellResult], float | None]) -> float | None:
        """Returns the mean of a quantity over all results of an arm that have it."""
        found = [v for v in map(value, self.results(arm)) if v is not None]
        return statistics.fmean(found) if found else None

    def arms(self, backbone: str) -> tuple[Arm, ...]:
        """Returns the columns of one backbone's table."""
        return tuple(arm for arm in self.comparison.arms if arm.backbone == backbone)

    @cached_property
    def choices(self) -> dict[Group, Choice]:
        """What was chosen for each arm, and from what; empty where there was nothing to choose."""
        found = {
            group: choose(
                (tried for tried in self.searched if group.holds(tried[0])),
                self.comparison.selection,
            )
            for group in self.comparison.groups
        }
        return {group: choice for group, choice in found.items() if choice.means}

    def rows(self, backbone: str) -> list[Row]:
        """Returns the rows of a table: tasks by category, their averages, the overall one."""
        arms = self.arms(backbone)
        by_category: dict[str, list[Row]] = defaultdict(list)
        for task in self.comparison.tasks:
            row = self._task_row(task, arms)
            by_category[row.category].append(row)
        rows: list[Row] = []
        for category, members in by_category.items():
            rows += members
            if len(members) > 1 and len(by_category) > 1:
                tasks = [row.name for row in members]
                entries = tuple(self.average(arm, tasks) for arm in arms)
                rows.append(Row("average", f"Average of {_last(category)}", category, entries))
        none = tuple(None for _ in arms)
        rows += [
            Row("task", task, "Other", none, remark="unavailable") for task in self.unavailable
        ]
        if len(self.comparison.tasks) > 1:
            entries = tuple(self.average(arm, self.comparison.tasks) for arm in arms)
            rows.append(Row("overall", f"Average of {self.counted_tasks}", "", entries))
        return rows

    @property
    def counted_tasks(self) -> str:
        """What averages are of, in words: "all tasks", "51 of 52 tasks"."""
        known = len(self.comparison.tasks)
        whole = known + len(self.unavailable)
        return "all tasks" if known == whole else f"{known} of {whole} tasks"

    def below_majority(self, backbone: str) -> list[str]:
        """Returns a sentence for each arm that does not beat the commonest label on a task."""
        return [
            f"{arm} on {row.name} ({100 * entry.mean:.2f}) does not beat the commonest label"
            f" ({100 * row.majority:.2f})."
            for row in self.rows(backbone)
            if row.majority is not None
            for arm, entry in zip(self.arms(backbone), row.entries, strict=True)
            if entry is not None and entry.mean <= row.majority
        ]

    def _task_row(self, task: str, arms: Sequence[Arm]) -> Row:
        entries = tuple(self.spread(arm, task) for arm in arms)
        known = [result for arm in arms for result in self.results(arm, task)]
        if not known:
            return Row("task", task, "Other", entries)
        first = known[0]
        return Row(
            "task", task, first.category, entries, first.metric, _remark(first), first.majority
        )


def _remark(result: CellResult) -> str:
    """What must stand beside a score: rows that are not those of the paper, or only few."""
    parts = [] if result.status == "complete" else [result.status]
    tested = result.rows.get("test", 0)
    if 0 < tested <= 100:
        parts.append(f"{tested} test rows: noisy")
    return ", ".join(parts)


def _last(category: str) -> str:
    return category.rpartition("/")[2]


def summarise(store: Store, name: str = NOTE) -> Summary:
    """Returns what the store says of its last comparison of a name.

    Raises StateError if it holds none.
    """
    note = store.note(name)
    if note is None:
        raise StateError("There is no comparison in this store yet. Run one first.")
    done, failed = store.done(), store.failed()

    def look_up(ids: Iterable[str]) -> tuple[tuple[Cell, CellResult | None], ...]:
        found: list[tuple[Cell, CellResult | None]] = []
        for cell_id in ids:
            if cell_id in done:
                found.append((done[cell_id].cell, done[cell_id].result))
            elif cell_id in failed:
                found.append((failed[cell_id].cell, None))
        return tuple(found)

    ids = dict.fromkeys([*note["searched"], *note["final"]])
    return Summary(
        asked=Comparison(**note["comparison"]),
        final=look_up(note["final"]),
        searched=look_up(note["searched"]),
        failures=tuple(failed[cell_id] for cell_id in ids if cell_id in failed),
        pending=sum(cell_id not in done and cell_id not in failed for cell_id in ids),
        unavailable=note.get(UNAVAILABLE, {}),
    )
