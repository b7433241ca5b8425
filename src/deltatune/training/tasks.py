"""Several tasks, one run: `fit_tasks`.

One delta learns them all, or each has a slot of its own in one bank. It is one run of `fit`, over a
`Mixture`: one loop, budget, schedule, log and checkpoint, and one step that is best for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.core.run import RoutedRun, Run
from deltatune.training.batch import row_ids
from deltatune.training.budget import Budget
from deltatune.training.loop import Validate, fit
from deltatune.training.mixture import Mixture
from deltatune.training.progress import Progress
from deltatune.training.settings import Settings
from deltatune.training.state import Result
from deltatune.training.step import Collate
from deltatune.training.trunk_cache import TrunkCache

__all__ = ["AVERAGE", "averaged", "fit_tasks", "of_task", "on_slot"]

AVERAGE = "average"


def fit_tasks(
    delta: Delta,
    rows: Mixture,
    collate: Collate,
    *,
    settings: Settings,
    budget: Budget,
    validate: Mapping[str, Validate] | None = None,
    metric: str = AVERAGE,
    folder: Path | None = None,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
) -> Result:
    """Trains a delta on several tasks as one run, which `fit` does.

    A delta of one slot learns all tasks. One with as many slots as there are tasks has a slot for
    each, in their order: a row reaches that of its task, and what the slots share. A slot that a
    batch has no rows for stays as it is.

    Args:
        delta: attached.
        rows: of the tasks.
        collate: rows of any of the tasks to a batch of tensors; see `fit`.
        settings: how to train.
        budget: how long, all tasks together.
        validate: task to its scores, its own metric first; called with the delta as that task has
            it. None: nothing is validated.
        metric: the score that decides which step was best, of those of `averaged`.
        folder: of the run; see `fit`.
        progress: what shows the run.
        trunk_cache: see `fit`.

    Returns:
        What was measured; the scores are those of `averaged`.

    Raises:
        ConfigurationError: there are neither one slot nor as many as tasks, or what `fit` raises.
        UnknownNameError: `validate` names a task that the rows do not.
        UnsupportedError: a slot for each task, and a method with a policy of its own.
        ArtefactError, TrainingError: see `fit`.
    """
    run = Run(delta)
    if delta.slots > 1:
        _check_slots(delta, rows)
        run, rows, collate = RoutedRun(delta), rows.map(_Routed), _collate_routed(collate)
    return fit(
        run,
        rows,
        collate,
        settings=settings,
        budget=budget,
        validate=None if validate is None else _validation(delta, rows.names, validate),
        metric=metric if validate else None,
        folder=folder,
        progress=progress,
        trunk_cache=trunk_cache,
    )


def averaged(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The scores of several tasks as those of one: "average", over the first score of each task,
    and every score under "task/score".

    Args:
        found: task to scores.
    """
    average = fmean(next(iter(scores.values())) for scores in found.values())
    named = {f"{task}/{name}": s for task, scores in found.items() for name, s in scores.items()}
    return {AVERAGE: average, **named}


def of_task(scores: Mapping[str, float], task: str) -> dict[str, float]:
    """The scores of one task among those of `averaged`, by the names that they have alone."""
    mine = f"{task}/"
    return {n.removeprefix(mine): s for n, s in scores.items() if n.startswith(mine)}


def on_slot(delta: Delta, task: int) -> AbstractContextManager[None]:
    """Within it every row goes through what a delta has of a task, by the task's number."""
    return delta.route([task]) if delta.slots > 1 else nullcontext()


@dataclass(frozen=True)
class _Routed:
    """A row and the slot of its task."""

    slot: int
    row: Any

    @property
    def input_ids(self) -> Sequence[int]:
        """Those of the row."""
        return row_ids(self.row)

    @property
    def others(self) -> tuple[_Routed, ...]:
        """What may take its place; see `batch.visited`."""
        return tuple(_Routed(self.slot, other) for other in getattr(self.row, "others", ()))


def _collate_routed(collate: Collate) -> Collate:
    def collated(rows: Sequence[_Routed]) -> dict[str, Tensor]:
        batch = collate([one.row for one in rows])
        return {**batch, "slots": torch.tensor([one.slot for one in rows])}

    return collated


def _validation(delta: Delta, names: Sequence[str], validate: Mapping[str, Validate]) -> Validate:
    for name in validate:
        if name not in names:
            raise UnknownNameError("task of the mixture", name, names)

    def scores() -> dict[str, float]:
        found = {}
        for task, name in enumerate(names):
            if name in validate:
                with on_slot(delta, task):
                    found[name] = validate[name]()
        return averaged(found)

    return scores


def _check_slots(delta: Delta, rows: Mixture) -> None:
    if delta.slots != len(rows.names):
        raise ConfigurationError(
            f"{len(rows.names)} tasks have one slot for all of them or one each; {delta.name} has "
            f"{delta.slots}. Attach with slots={len(rows.names)}, or without slots."
        )
    for part in delta.parts:
        method = part.method
        if method.has_policy() or method.has_penalty() or method.wanted is not None:
            raise UnsupportedError(
                f"{method.name} acts on every step of its slot, and a step of several tasks is not "
                "one of every slot. Train one delta on all tasks, or each alone with fit_many."
            )
