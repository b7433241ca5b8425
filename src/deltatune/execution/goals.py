"""Goals: the tasks of a cell with their rows, scored one by one or, where several, on average."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from deltatune.backbones.load import Backbone
from deltatune.core.errors import ConfigurationError
from deltatune.evaluation.scoring import score
from deltatune.execution.ground import Evaluated, evaluate_on, rows_of
from deltatune.tasks.example import SplitName, Splits
from deltatune.tasks.records import names_of
from deltatune.tasks.task import Task
from deltatune.tasks.text import digest
from deltatune.training.tasks import AVERAGE, averaged

__all__ = ["Goal", "Goals", "goals_of"]


@dataclass(frozen=True)
class Goal:
    """A task with its rows."""

    task: Task
    splits: Splits

    @property
    def majority(self) -> float | None:
        """The score of always giving the commonest label of the training rows."""
        task, train, test = self.task, self.splits.train, self.splits.test
        if task.kind != "classification" or not train or not test:
            return None
        commonest = Counter(example.targets[0] for example in train).most_common(1)[0][0]
        return score(task, [commonest] * len(test), test)[task.metric]


class Goals(tuple[Goal, ...]):
    """The tasks of a cell. What is said of several is said of their average."""

    @property
    def tasks(self) -> list[Task]:
        """Without rows."""
        return [goal.task for goal in self]

    @property
    def name(self) -> str:
        """As a cell names them."""
        return " + ".join(task.name for task in self.tasks)

    @property
    def metric(self) -> str:
        """Which score decides."""
        return self[0].task.metric if len(self) == 1 else AVERAGE

    @property
    def version(self) -> int | str:
        """That of the task's record; of several, each of theirs."""
        found = [task.version for task in self.tasks]
        return found[0] if len(found) == 1 else " + ".join(map(str, found))

    @property
    def category(self) -> str:
        """The place of the task in a table; several stand apart."""
        found = {task.provenance.category for task in self.tasks}
        return found.pop() if len(self) == 1 else "Several tasks"

    @property
    def status(self) -> str:
        """That of the rows; of several, each kind that is not complete."""
        found = dict.fromkeys(goal.splits.status for goal in self)
        return ", ".join(kind for kind in found if kind != "complete") or "complete"

    @property
    def notes(self) -> tuple[str, ...]:
        """What must stand beside a score."""
        return tuple(
            note if len(self) == 1 else f"{goal.task.name}: {note}"
            for goal in self
            for note in (*goal.task.notes, *goal.splits.notes)
        )

    @property
    def majority(self) -> float | None:
        """See `Goal`; None where one of them has none."""
        found = [goal.majority for goal in self]
        known = [one for one in found if one is not None]
        return fmean(known) if len(known) == len(found) else None

    @property
    def digest(self) -> str:
        """Of all rows, in order."""
        found = [goal.splits.digest for goal in self]
        return found[0] if len(found) == 1 else digest(*found)

    def rows(self, split: SplitName) -> int:
        """How many rows a split has."""
        return sum(len(getattr(goal.splits, split)) for goal in self)

    def evaluate(
        self,
        backbone: Backbone,
        split: SplitName,
        options: Mapping[str, Any],
        on: Callable[[int], AbstractContextManager[None]],
    ) -> Evaluated:
        """Scores a backbone, with whatever delta is attached to it, on the rows of a split.

        Args:
            backbone: in the form that does all tasks.
            split: which rows.
            options: see `evaluate_on`.
            on: within it, by the number of a task, the delta is what that task has of it.
        """
        found: dict[str, Evaluated] = {}
        for number, goal in enumerate(self):
            with on(number):
                examples = getattr(goal.splits, split)
                found[goal.task.name] = evaluate_on(backbone, goal.task, examples, options=options)
        if len(self) == 1:
            return found[self[0].task.name]
        warnings = tuple(line for one in found.values() for line in one.warnings)
        return Evaluated(averaged({name: one.scores for name, one in found.items()}), warnings)


def goals_of(
    text: str, protocol: str, data: str | Path | None, options: Mapping[str, Any]
) -> Goals:
    """The tasks in "one + another", each with its rows, as `rows_of` gives them.

    Raises ConfigurationError if two of them have one name.
    """
    found = Goals(Goal(*rows_of(name, protocol, data, options)) for name in names_of(text))
    names = [task.name for task in found.tasks]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            f"Tasks that are trained together need names of their own; found {', '.join(names)}."
        )
    return found
