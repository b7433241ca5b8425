"""A cell that is ready to be trained, and what becomes of it when it was."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor

from deltatune.backbones.encoding import Encoding, collate, encode
from deltatune.backbones.load import Backbone
from deltatune.core.artefact import save, stored_tensors
from deltatune.core.delta import Delta
from deltatune.core.grammar import Expression, parse
from deltatune.core.host import DRAWN
from deltatune.core.quantised import count_parameters
from deltatune.evaluation.score import score
from deltatune.execution.ground import (
    Evaluated,
    backbone_for,
    check_options,
    evaluate_on,
    rows_of,
)
from deltatune.study.cell import Cell, CellResult, Point
from deltatune.study.comparison import preset
from deltatune.study.source import library_versions
from deltatune.tasks.example import SplitName, Splits
from deltatune.tasks.task import Task
from deltatune.training.settings import Settings
from deltatune.training.state import Result
from deltatune.training.step import Collate

__all__ = ["Prepared", "prepare"]


@dataclass
class Prepared:
    """A cell with all that its training needs.

    Attributes:
        expression: the method with the head of the task.
        encoding: the training rows as the backbone reads them.
        folder: see `execute`.
        evaluating: seconds spent on the validation rows so far.
    """

    cell: Cell
    task: Task
    splits: Splits
    backbone: Backbone
    expression: Expression
    encoding: Encoding
    folder: Path | None
    evaluating: float = field(default=0.0, init=False)

    @property
    def settings(self) -> Settings:
        """Those of the cell; its seed, on top of theirs, orders the rows and keys dropout too."""
        rate = self.cell.settings.learning_rate
        known = {
            "learning_rate": preset(self.cell.method) if rate is None else rate,
            "seed": self.cell.settings.seed + self.cell.seed,
        }
        return self.cell.settings.model_copy(update=known)

    def settings_of(self, stage: int | None) -> Settings:
        """Those of a stage: without a rate of the cell's, at that of its own methods."""
        if stage is None or self.cell.settings.learning_rate is not None:
            return self.settings
        rates = [method.learning_rate for method in self.expression.of_stage(stage)]
        return self.settings.model_copy(update={"learning_rate": min(rates)})

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
        if not self.expression.in_place or self.task.kind != "regression":
            return
        for path in self.backbone.model.__dict__.get(DRAWN, ()):
            bias = getattr(self.backbone.model.get_submodule(path), "bias", None)
            if isinstance(bias, Tensor) and len(bias) == self.task.head_width:
                torch.nn.init.constant_(bias, _start(self.task, self.splits))

    def validate(self) -> Mapping[str, float]:
        """Scores on the validation rows, of the model as it is."""
        started = time.perf_counter()
        found = evaluate_on(
            self.backbone, self.task, self.splits.validation, options=self.cell.options
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
        test = evaluate_on(self.backbone, self.task, self.splits.test, options=self.cell.options)
        kept = None
        if self.folder is not None:
            facts = self._facts(validation, test)
            kept = save(delta, self.folder / "delta", slot=slot, facts=facts, overwrite=True)
        truncated = () if self.encoding.warning is None else (self.encoding.warning,)
        notes = (*self.task.notes, *self.splits.notes, *truncated, *test.warnings)
        model = self.backbone.model
        return CellResult(
            metric=self.task.metric,
            scores=test.scores,
            validation=validation,
            majority=_majority(self.task, self.splits),
            category=self.task.provenance.category,
            status=self.splits.status,
            notes=tuple(dict.fromkeys(notes)),
            trainable=delta.bank.numel,
            stored=sum(tensor.numel() for tensor in stored_tensors(delta, slot).values()),
            base=count_parameters(model),
            rows={name: len(getattr(self.splits, name)) for name in get_args(SplitName)},
            steps=result.steps,
            seconds=result.seconds,
            total_seconds=seconds + time.perf_counter() - started,
            memory=memory,
            curve=tuple(_curve(result, self.task.metric)),
            device=str(next(model.parameters()).device),
            versions=library_versions(),
            artefact=None if kept is None else str(kept),
        )

    def _facts(self, validation: Mapping[str, float], test: Evaluated) -> dict[str, Any]:
        return {
            "backbone": self.cell.backbone,
            "task": self.task.name,
            "task_version": self.task.version,
            "protocol": self.cell.protocol,
            "rows": self.splits.digest,
            "seed": self.cell.seed,
            "budget": self.cell.budget,
            "dtype": self.cell.options.get("dtype"),
            "quantise": self.cell.options.get("quantise"),
            "settings": self.settings.model_dump(mode="json"),
            "validation": validation,
            "test": test.scores,
            "versions": library_versions(),
        }


def prepare(cell: Cell, *, data: str | Path | None, folder: Path | None) -> Prepared:
    """Reads rows and backbone of a cell. See `execute`."""
    check_options(cell.options)
    task, splits = rows_of(cell.task, cell.protocol, data, cell.options)
    backbone = backbone_for(cell.backbone, task, cell.revision, cell.options)
    encoding = encode(
        splits.train,
        backbone.tokenizer,
        backbone.form,
        maximum_source=int(cell.options.get("maximum_source") or task.lengths.source),
        maximum_target=task.lengths.target,
    )
    expression = _with_head(parse(cell.method).at(cell.at), backbone, task, splits)
    return Prepared(cell, task, splits, backbone, expression, encoding, folder)


def _with_head(
    expression: Expression, backbone: Backbone, task: Task, splits: Splits
) -> Expression:
    """The expression with a head of the task's own, where the form needs one and none is there."""
    complete = any(method.category == "head" for method in expression)
    if backbone.form != "encoder" or complete or expression.in_place:
        return expression
    return expression + f"head(labels={task.head_width}, start={_start(task, splits)})"


def _start(task: Task, splits: Splits) -> float:
    """Where the bias of a new head begins: the mean of the labels, to four digits."""
    if task.kind != "regression" or not splits.train:
        return 0.0
    return float(f"{fmean(float(example.label or 0) for example in splits.train):.4g}")


def _kept_scores(result: Result) -> dict[str, float]:
    """The validation scores of the tensors that were kept."""
    kept = next(point for point in result.history if point.step == result.kept_step)
    return {name: math.nan if s is None else s for name, s in kept.scores.items()}


def _majority(task: Task, splits: Splits) -> float | None:
    """The score of always giving the commonest label of the training rows."""
    if task.kind != "classification" or not splits.train or not splits.test:
        return None
    commonest = Counter(example.targets[0] for example in splits.train).most_common(1)[0][0]
    return score(task, [commonest] * len(splits.test), splits.test)[task.metric]


def _curve(result: Result, metric: str) -> Iterator[Point]:
    """The evaluations, each with the mean loss since the one before."""
    before = 0
    for point in result.history:
        losses = list(itertools.islice(result.losses, before, point.step))
        before = point.step
        mean = sum(losses) / len(losses) if losses else None
        found = point.scores.get(metric)
        yield Point(step=point.step, seconds=point.seconds, loss=mean, validation=found)
