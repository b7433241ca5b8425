"""One cell, carried out: a task's rows, a backbone, a delta, training, scores, and what is kept.

Here tasks, backbones, the kernel, training and evaluation meet. The test rows are looked at once,
after everything is decided.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deltatune.backbones.encoding import collate, encode
from deltatune.backbones.load import Backbone, form_of, load_backbone
from deltatune.core.artefact import save, stored_tensors
from deltatune.core.delta import Delta, attach
from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.fingerprint import fingerprint
from deltatune.core.grammar import Expression, parse
from deltatune.core.quantised import count_parameters
from deltatune.core.run import Run
from deltatune.evaluation.predict import Mode, predict
from deltatune.evaluation.score import score
from deltatune.study.cell import Cell, CellResult, Point
from deltatune.study.comparison import preset
from deltatune.study.source import library_versions
from deltatune.tasks.example import Example, ProtocolName, Splits
from deltatune.tasks.records import find_task
from deltatune.tasks.task import Task
from deltatune.training.budget import parse as parse_budget
from deltatune.training.loop import fit
from deltatune.training.progress import Progress
from deltatune.training.settings import Settings
from deltatune.training.state import Result

__all__ = [
    "OPTIONS",
    "Evaluated",
    "attached",
    "backbone_for",
    "check_options",
    "describe",
    "evaluate_on",
    "execute",
    "rows_of",
]

OPTIONS: Mapping[str, str] = {
    "train_rows": "at most so many rows to train on",
    "validation_rows": "at most so many rows to validate on",
    "test_rows": "at most so many rows for the final score",
    "maximum_source": "longest input in tokens; else the task's own",
    "mode": "how a text-to-text model answers: generate or rank",
    "quantise": "how the frozen linear maps are kept: int8 or nf4; else in plain numbers",
}

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Evaluated:
    """Scores of a model on rows of a task.

    Attributes:
        scores: metric to score, fractions; the task's own first.
        warnings: lines about rows that had to be truncated.
    """

    scores: dict[str, float]
    warnings: tuple[str, ...]


def execute(
    cell: Cell,
    *,
    data: str | Path | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> CellResult:
    """Carries out a cell.

    Args:
        cell: what to do.
        data: where task rows are, see `Task.load`.
        folder: keeps `run/`, from which an interrupted cell goes on, and `delta/`, the artefact;
            None keeps nothing.
        progress: what shows the training.

    Raises:
        DeltatuneError: whatever is wrong with names, rows, settings or the run itself.
    """
    started = time.perf_counter()
    check_options(cell.options)
    task, splits = rows_of(cell.task, cell.protocol, data, cell.options)
    backbone = backbone_for(cell.backbone, task, cell.revision, cell.options)
    expression = _with_head(parse(cell.method).at(cell.at), backbone, task)
    base = count_parameters(backbone.model)
    with attached(attach(backbone.model, expression, seed=cell.seed)) as delta:
        result, warnings = _train(cell, delta, backbone, task, splits, folder, progress)
        validation = _kept_scores(result)
        test = evaluate_on(backbone, task, splits.test, options=cell.options)
        facts = _facts(cell, task, splits, validation, test)
        kept = (
            None if folder is None else save(delta, folder / "delta", facts=facts, overwrite=True)
        )
        stored = sum(tensor.numel() for tensor in stored_tensors(delta).values())
        trainable = delta.bank.numel
    return CellResult(
        metric=task.metric,
        scores=test.scores,
        validation=validation,
        majority=_majority(task, splits),
        category=task.provenance.category,
        status=splits.status,
        notes=tuple(dict.fromkeys((*task.notes, *splits.notes, *warnings, *test.warnings))),
        trainable=trainable,
        stored=stored,
        base=base,
        rows={name: len(getattr(splits, name)) for name in get_args(SplitName)},
        steps=result.steps,
        seconds=result.seconds,
        total_seconds=time.perf_counter() - started,
        memory=result.peak_device_memory or result.peak_memory,
        curve=tuple(_curve(result, task.metric)),
        device=str(next(backbone.model.parameters()).device),
        versions=library_versions(),
        artefact=None if kept is None else str(kept),
    )


def evaluate_on(
    backbone: Backbone,
    task: Task,
    examples: tuple[Example, ...],
    *,
    options: Mapping[str, Any],
) -> Evaluated:
    """Scores a backbone, with whatever delta is attached to it, on examples."""
    warnings: list[str] = []
    mode: Mode = options.get("mode") or "generate"
    predictions = predict(
        backbone.model,
        backbone.tokenizer,
        backbone.form,
        examples,
        task,
        mode=mode,
        maximum_source=options.get("maximum_source"),
        warnings=warnings,
    )
    return Evaluated(score(task, predictions, examples), tuple(warnings))


def rows_of(
    name: str, protocol: str, data: str | Path | None, options: Mapping[str, Any]
) -> tuple[Task, Splits]:
    """The task and its rows, at most as many of each split as the options say."""
    if protocol not in get_args(ProtocolName):
        raise UnknownNameError("protocol", protocol, get_args(ProtocolName))
    task, splits = _read(name, protocol, None if data is None else str(data))
    train, validation, test = (options.get(f"{split}_rows") for split in get_args(SplitName))
    return task, splits.limit(train, validation, test)


def backbone_for(
    name: str, task: Task, revision: str | None, options: Mapping[str, Any]
) -> Backbone:
    """The backbone in the form that does the task: encoders with a head as wide as its labels.

    Raises ConfigurationError where an encoder cannot do the task.
    """
    revision = revision if revision is not None and not revision.startswith("weights:") else None
    width = None
    if form_of(name, revision=revision) == "encoder":
        width = task.head_width
        if width is None:
            raise ConfigurationError(
                f"{task.name} asks for text, and {name} is an encoder, which answers with a class "
                "or a value. Choose an encoder-decoder or a decoder."
            )
    quantise = options.get("quantise")
    return _loaded(name, width, revision, None if quantise is None else str(quantise))


def describe(backbone: str, task: str, *, protocol: str, data: str | Path | None) -> dict[str, Any]:
    """What identifies a cell's backbone and rows beside their names: `revision` and `data`."""
    record, splits = rows_of(task, protocol, data, {})
    return {
        "revision": _identity(backbone),
        "data": f"{record.name} version {record.version}, {record.digest}, {splits.digest}",
    }


# One backbone serves all cells that follow each other on it: every delta leaves it as it was.
@functools.lru_cache(maxsize=1)
def _loaded(name: str, labels: int | None, revision: str | None, quantise: str | None) -> Backbone:
    return load_backbone(name, labels=labels, revision=revision, quantise=quantise)


@functools.cache
def _identity(backbone: str) -> str:
    loaded = load_backbone(backbone)
    return loaded.revision or f"weights:{fingerprint(loaded.model).weights}"


@functools.lru_cache(maxsize=4)
def _read(name: str, protocol: ProtocolName, data: str | None) -> tuple[Task, Splits]:
    task = find_task(name)
    return task, task.load(data, protocol)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UnknownNameError for an option that is not in OPTIONS."""
    for name in options:
        if name not in OPTIONS:
            raise UnknownNameError("option", name, OPTIONS)


def _with_head(expression: Expression, backbone: Backbone, task: Task) -> Expression:
    """The expression with a head of the task's own, where the form needs one and none is there."""
    complete = any(method.in_place or method.category == "head" for method in expression)
    if backbone.form != "encoder" or complete:
        return expression
    return expression + f"head(labels={task.head_width})"


def _train(
    cell: Cell,
    delta: Delta,
    backbone: Backbone,
    task: Task,
    splits: Splits,
    folder: Path | None,
    progress: Progress | None,
) -> tuple[Result, tuple[str, ...]]:
    encoding = encode(
        splits.train,
        backbone.tokenizer,
        backbone.form,
        maximum_source=int(cell.options.get("maximum_source") or task.lengths.source),
        maximum_target=task.lengths.target,
    )

    def validate() -> Mapping[str, float]:
        return evaluate_on(backbone, task, splits.validation, options=cell.options).scores

    result = fit(
        Run(delta),
        encoding.rows,
        functools.partial(collate, tokenizer=backbone.tokenizer, form=backbone.form),
        settings=_settings(cell),
        budget=parse_budget(cell.budget),
        validate=validate,
        metric=task.metric,
        folder=None if folder is None else folder / "run",
        progress=progress,
    )
    return result, () if encoding.warning is None else (encoding.warning,)


def _settings(cell: Cell) -> Settings:
    """The cell's settings; its seed, on top of theirs, orders the rows and keys dropout too."""
    rate = cell.settings.learning_rate
    known = {
        "learning_rate": preset(cell.method) if rate is None else rate,
        "seed": cell.settings.seed + cell.seed,
    }
    return cell.settings.model_copy(update=known)


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


def _facts(
    cell: Cell, task: Task, splits: Splits, validation: dict[str, float], test: Evaluated
) -> dict[str, Any]:
    return {
        "backbone": cell.backbone,
        "task": task.name,
        "task_version": task.version,
        "protocol": cell.protocol,
        "rows": splits.digest,
        "seed": cell.seed,
        "budget": cell.budget,
        "quantise": cell.options.get("quantise"),
        "settings": _settings(cell).model_dump(mode="json"),
        "validation": validation,
        "test": test.scores,
        "versions": library_versions(),
    }


@contextmanager
def attached(delta: Delta) -> Iterator[Delta]:
    """A delta that is detached at the end, whatever happens."""
    try:
        yield delta
    finally:
        delta.detach()
