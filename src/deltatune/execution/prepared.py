"""A cell that is ready to be trained, and what becomes of it when it was."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast, get_args

import torch
from torch import Tensor

from deltatune.backbones.encoding import Encoding, Row, collate, encode
from deltatune.backbones.load import Backbone
from deltatune.backbones.provenance import corpora_of, digests_of, licence_of
from deltatune.core.artefact import save, stored_tensors
from deltatune.core.attaching import attach
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.fingerprint import vocabulary
from deltatune.core.grammar import Expression, parse
from deltatune.core.host import DRAWN
from deltatune.core.layout import Sharing
from deltatune.core.quantised import count_parameters
from deltatune.execution.goals import Goal, Goals, goals_of
from deltatune.execution.ground import backbone_for, check_options, evaluate_on
from deltatune.execution.measures import measure, on_text
from deltatune.execution.profiling import profiled
from deltatune.study.cell import Cell, CellResult, Point
from deltatune.study.comparison import preset
from deltatune.study.source import library_versions
from deltatune.tasks.example import SplitName
from deltatune.training.budget import Budget, parse_stages
from deltatune.training.loop import Validate
from deltatune.training.mixture import Mixture
from deltatune.training.settings import Settings
from deltatune.training.state import Result
from deltatune.training.step import Collate
from deltatune.training.tasks import of_task, on_slot

__all__ = ["Prepared", "prepare"]


@dataclass
class Prepared:
    """A cell with all that its training needs.

    Attributes:
        goals: its tasks with their rows.
        expressions: the method with the head of a task, of each slot.
        sharing: what the slots have in common; see `attach`.
        rows: the training rows as the backbone reads them; those of several tasks as a mixture.
        warnings: lines about rows that had to be truncated.
        data: see `execute`.
        folder: see `execute`.
        evaluating: seconds spent on the validation rows so far.
    """

    cell: Cell
    goals: Goals
    backbone: Backbone
    expressions: tuple[Expression, ...]
    sharing: Sharing
    rows: Sequence[Row]
    warnings: tuple[str, ...]
    data: str | Path | None
    folder: Path | None
    evaluating: float = field(default=0.0, init=False)

    @property
    def expression(self) -> Expression:
        """The method of the first slot."""
        return self.expressions[0]

    def attach(self) -> Delta:
        """A delta to train, on the backbone."""
        return attach(
            self.backbone.model, self.expressions, seed=self.cell.seed, sharing=self.sharing
        )

    @property
    def settings(self) -> Settings:
        """Those of the cell; see `settings_of`."""
        return self.settings_of(None)

    def settings_of(self, stage: int | None) -> Settings:
        """Those of a stage: without a rate in the cell, at that of its own methods. The seed of the
        cell, on top of theirs, orders the rows and keys dropout too.
        """
        settings = self.cell.settings if stage is None else self.cell.settings_of(stage)
        rate = settings.learning_rate
        if rate is None and stage is not None:
            rate = min(method.learning_rate for method in self.expression.of_stage(stage))
        rate = preset(self.cell.method) if rate is None else rate
        known = {"learning_rate": rate, "seed": settings.seed + self.cell.seed}
        return settings.model_copy(update=known)

    def budget_of(self, stage: int | None) -> Budget:
        """That of a stage."""
        budgets = parse_stages(self.cell.budget)
        return budgets[0] if stage is None or len(budgets) == 1 else budgets[stage]

    def run_folder(self, stage: int | None = None) -> Path | None:
        """Where the checkpoints are, of a stage."""
        if self.folder is None:
            return None
        return self.folder / ("run" if stage is None else f"run-{stage + 1}")

    @property
    def collate(self) -> Collate:
        """Encoded rows to a batch."""
        return functools.partial(
            collate, tokenizer=self.backbone.tokenizer, form=self.backbone.form
        )

    def begin(self) -> None:
        """Gives the backbone's own new head, which a control trains, the start of other heads."""
        goal = self.goals[0]
        if not self.expression.in_place or goal.task.kind != "regression":
            return
        for path in self.backbone.model.__dict__.get(DRAWN, ()):
            bias = getattr(self.backbone.model.get_submodule(path), "bias", None)
            if isinstance(bias, Tensor) and len(bias) == goal.task.head_width:
                torch.nn.init.constant_(bias, _start(goal))

    @property
    def validate(self) -> Validate:
        """Scores on the validation rows of the first task, of the model as it is."""
        return functools.partial(self._validate, self.goals[0])

    @property
    def validations(self) -> dict[str, Validate]:
        """Task to its scores on its validation rows, of the model as it is."""
        return {goal.task.name: functools.partial(self._validate, goal) for goal in self.goals}

    def _validate(self, goal: Goal) -> Mapping[str, float]:
        started = time.perf_counter()
        found = evaluate_on(
            self.backbone, goal.task, goal.splits.validation, options=self.cell.options
        )
        self.evaluating += time.perf_counter() - started
        return found.scores

    def finish(
        self,
        delta: Delta,
        result: Result,
        *,
        slot: int = 0,
        seconds: float,
        memory: int | None,
    ) -> CellResult:
        """Looks at the test rows, and keeps the delta.

        Args:
            delta: with the trained values, as the batches are routed now.
            result: of the training.
            slot: of the delta.
            seconds: of the cell until now.
            memory: highest use during training in bytes.
        """
        started = time.perf_counter()
        validation = _kept_scores(result)
        test = self.goals.evaluate(
            self.backbone, "test", self.cell.options, functools.partial(self._on, delta)
        )
        several = len(self.expressions) > 1
        slots = [*range(delta.slots)] if several else [slot]
        kept = self._keep(delta, slots, test.scores, result, memory)
        model = self.backbone.model
        return CellResult(
            metric=self.goals.metric,
            scores=test.scores,
            validation=validation,
            measured=self._measured(delta),
            majority=self.goals.majority,
            category=self.goals.category,
            status=self.goals.status,
            notes=tuple(dict.fromkeys((*self.goals.notes, *self.warnings, *test.warnings))),
            trainable=delta.bank.total if several else delta.bank.numel,
            stored=sum(t.numel() for one in slots for t in stored_tensors(delta, one).values()),
            base=count_parameters(model),
            rows={name: self.goals.rows(name) for name in get_args(SplitName)},
            steps=result.steps,
            seconds=result.seconds,
            total_seconds=seconds + time.perf_counter() - started,
            memory=memory,
            curve=tuple(_curve(result, self.goals.metric)),
            device=str(next(model.parameters()).device),
            versions=library_versions(),
            artefact=None if kept is None else str(kept),
        )

    def _measured(self, delta: Delta) -> dict[str, float]:
        """What the options ask for beside the scores. Comes last: a profile trains on."""
        found = measure(
            self.backbone,
            self.goals,
            self.cell.options,
            protocol=self.cell.protocol,
            data=self.data,
            on=functools.partial(self._on, delta),
        )
        options, settings = self.cell.options, self.settings
        found |= on_text(self.backbone, delta, options)
        return found | profiled(delta, self.rows, self.collate, settings, options)

    def _on(self, delta: Delta, task: int) -> AbstractContextManager[None]:
        """Within it the delta is what a task has of it. A cell of one task is routed by others."""
        return on_slot(delta, task) if len(self.goals) > 1 else nullcontext()

    def _keep(
        self,
        delta: Delta,
        slots: Sequence[int],
        test: Mapping[str, float],
        result: Result,
        memory: int | None,
    ) -> Path | None:
        """Saves a delta, or one for each task beside each other; returns the folder."""
        if self.folder is None:
            return None
        validation = _kept_scores(result)
        device = str(next(self.backbone.model.parameters()).device)
        measured = {"seconds": result.seconds, "memory": memory, "device": device}
        facts = {"trainable": delta.bank.numel}
        if len(slots) == 1:
            place, facts = self.folder / "delta", facts | self._facts(self.goals, validation, test)
            save(delta, place, slot=slots[0], facts=facts, overwrite=True, measured=measured)
            return place
        for slot, goal in zip(slots, self.goals, strict=True):
            own = [of_task(scores, goal.task.name) for scores in (validation, test)]
            place = self.folder / "deltas" / goal.task.name
            told = facts | self._facts(Goals([goal]), *own)
            save(delta, place, slot=slot, facts=told, overwrite=True, measured=measured)
        return self.folder / "deltas"

    def _facts(
        self, goals: Goals, validation: Mapping[str, float], test: Mapping[str, float]
    ) -> dict[str, Any]:
        return {
            "backbone": self.cell.backbone,
            "licence": licence_of(self.backbone),
            "backbone_files": digests_of(self.backbone),
            "vocabulary": vocabulary(self.backbone.tokenizer),
            "task": goals.name,
            "task_version": goals.version,
            "protocol": self.cell.protocol,
            "rows": goals.digest,
            "counts": {name: goals.rows(name) for name in get_args(SplitName)},
            "seed": self.cell.seed,
            "budget": self.cell.budget,
            "stages": [dict(changes) for changes in self.cell.stages],
            "dtype": self.cell.options.get("dtype"),
            "quantise": self.cell.options.get("quantise"),
            # As wide as the most labels of all tasks that it was trained with.
            "head_width": max((task.head_width or 0 for task in self.goals.tasks), default=0),
            "settings": self.settings.model_dump(mode="json"),
            "validation": validation,
            "test": test,
            "versions": library_versions(),
        }


def prepare(cell: Cell, *, data: str | Path | None, folder: Path | None) -> Prepared:
    """Reads rows and backbone of a cell. See `execute`."""
    check_options(cell.options)
    _check_stages(cell)
    goals = goals_of(cell.task, cell.protocol, data, cell.options)
    backbone = backbone_for(cell.backbone, goals.tasks, cell.revision, cell.options)
    encodings = {goal.task.name: _encoded(goal, backbone, cell.options) for goal in goals}
    warnings = tuple(
        one.warning if len(goals) == 1 else f"{name}: {one.warning}"
        for name, one in encodings.items()
        if one.warning is not None
    ) + tuple(_seen(goals, backbone))
    expressions, sharing = _slots(cell, backbone, goals)
    rows = _rows(encodings, cell.options)
    return Prepared(cell, goals, backbone, expressions, sharing, rows, warnings, data, folder)


def _check_stages(cell: Cell) -> None:
    """Raises ConfigurationError for budgets or settings of stages that the method does not have."""
    stages = max(len(parse(cell.method).stages), 1)
    given = {"budgets": len(parse_stages(cell.budget)), "settings": len(cell.stages) or stages}
    for what, count in given.items():
        if count != stages and (what == "settings" or count != 1):
            raise ConfigurationError(
                f"{cell.method} has {stages} stage{'s' if stages > 1 else ''}, and there are "
                f"{what} for {count}. Give the same for all, or for each its own."
            )


def _slots(cell: Cell, backbone: Backbone, goals: Goals) -> tuple[tuple[Expression, ...], Sharing]:
    """What each slot holds, and what they have in common: one slot, or one for each of several
    tasks where that is wanted, or where each needs a head of its own.

    Raises UnsupportedError for a control on an encoder, which has one head.
    """
    expression = parse(cell.method).at(cell.at)
    sharing = cell.options.get("sharing")
    if len(goals) == 1 or (sharing is None and backbone.form != "encoder"):
        return (_with_head(expression, backbone, goals[0]),), "none"
    if expression.in_place:
        raise UnsupportedError(
            f"{goals.name}: {expression} trains the backbone itself, which is one for all tasks, "
            "with one head. Train it on each alone, or on a text-to-text backbone."
        )
    expressions = tuple(_with_head(expression, backbone, goal) for goal in goals)
    return expressions, cast(Sharing, "all" if sharing is None else sharing)


def _seen(goals: Goals, backbone: Backbone) -> Iterator[str]:
    """A sentence for each task whose texts the backbone was trained on."""
    corpora = set(corpora_of(backbone))
    for goal in goals:
        names = [name for name in goal.task.provenance.corpora if name in corpora]
        if names:
            yield (
                f"{goal.task.name}: {backbone.name} was trained on its texts, or some of them "
                f"({', '.join(names)})."
            )


def _encoded(goal: Goal, backbone: Backbone, options: Mapping[str, Any]) -> Encoding:
    return encode(
        goal.splits.train,
        backbone.tokenizer,
        backbone.form,
        maximum_source=int(options.get("maximum_source") or goal.task.lengths.source),
        maximum_target=goal.task.lengths.target,
    )


def _rows(encodings: Mapping[str, Encoding], options: Mapping[str, Any]) -> Sequence[Row]:
    """The rows of a task, or those of several as a mixture."""
    if len(encodings) == 1:
        return next(iter(encodings.values())).rows
    cap = options.get("cap")
    return Mixture(
        {name: encoding.rows for name, encoding in encodings.items()},
        temperature=float(options.get("temperature") or 1.0),
        cap=None if cap is None else int(cap),
        mixed=bool(options.get("mixed")),
    )


def _with_head(expression: Expression, backbone: Backbone, goal: Goal) -> Expression:
    """The expression with a head of the task's own, where the form needs one and none is there."""
    complete = any(method.category == "head" for method in expression)
    if backbone.form != "encoder" or complete or expression.in_place:
        return expression
    return expression + f"head(labels={goal.task.head_width}, start={_start(goal)})"


def _start(goal: Goal) -> float:
    """Where the bias of a new head begins: the mean of the labels, to four digits."""
    train = goal.splits.train
    if goal.task.kind != "regression" or not train:
        return 0.0
    return float(f"{fmean(float(example.label or 0) for example in train):.4g}")


def _kept_scores(result: Result) -> dict[str, float]:
    """The validation scores of the tensors that were kept."""
    kept = next(point for point in result.history if point.step == result.kept_step)
    return {name: math.nan if s is None else s for name, s in kept.scores.items()}


def _curve(result: Result, metric: str) -> Iterator[Point]:
    """The evaluations, each with the mean loss since the one before."""
    before = 0
    for point in result.history:
        losses = list(itertools.islice(result.losses, before, point.step))
        before = point.step
        mean = sum(losses) / len(losses) if losses else None
        found = point.scores.get(metric)
        yield Point(step=point.step, seconds=point.seconds, loss=mean, validation=found)
