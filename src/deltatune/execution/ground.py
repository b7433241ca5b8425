"""What a cell needs before it can be carried out: the task's rows and the backbone; and scoring."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from deltatune.backbones.load import Backbone, form_of, load_backbone
from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.fingerprint import fingerprint
from deltatune.evaluation.predicting import Mode, predict
from deltatune.evaluation.scoring import score
from deltatune.tasks.example import Example, ProtocolName, SplitName, Splits
from deltatune.tasks.manual import as_cloze
from deltatune.tasks.records import find_task, names_of
from deltatune.tasks.task import Task

__all__ = [
    "OPTIONS",
    "Evaluated",
    "backbone_for",
    "check_options",
    "describe",
    "evaluate_on",
    "rows_of",
]

OPTIONS: Mapping[str, str] = {
    "train_rows": "at most so many rows to train on",
    "validation_rows": "at most so many rows to validate on",
    "test_rows": "at most so many rows for the final score",
    "shots": "so many rows of each label to train on, and as many others to validate on",
    "shots_seed": "with shots: by which they are drawn; else 0",
    "maximum_source": "longest input in tokens; else the task's own",
    "template": "manual or no_template: the task as cloze, with the words of the paper's Table 2",
    "mode": "how a text-to-text model answers: generate or rank",
    "dtype": "numbers of the frozen backbone: float32 or bfloat16; deltas are float32 on both",
    "temperature": "of several tasks: 1 draws them as their rows are many, more makes them alike",
    "cap": "of several tasks: so many rows of one count at most when tasks are drawn",
    "mixed": "of several tasks: whether the rows of a batch are of all of them, not of one",
    "sharing": "of several tasks: a delta for each, which share none, what the method says, or all "
    "but heads; else one for all",
    "quantise": "how the frozen linear maps are kept: int8 or nf4; else in plain numbers",
    "score_training": "so many of the training rows are scored too, after training",
    "general_text": "a file of rows with a field text, which the trained delta is scored on too",
    "general_digest": "the first 16 digits of that file's SHA-256, where it is to be checked",
    "profile_rows": "after training, a step on so many rows is measured; 0: what is there without",
    "profile_tokens": "with profile_rows: the length of each of them; else 128",
    "transfer_to": "tasks, 'one + another', that the trained delta is scored on too, as it is",
    "error_rank": "with quantise: singular triplets of what is rounded off, kept for loftq",
}


_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Evaluated:
    """Scores of a model on rows of a task.

    Attributes:
        scores: metric to score, fractions; the task's own first.
        warnings: lines about rows that had to be truncated.
    """

    scores: dict[str, float]
    warnings: tuple[str, ...]


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
    """The task and its rows, at most as many of each split, or of each label, as the options say.

    Raises UnknownNameError for a protocol, and ConfigurationError for shots there are not.
    """
    if protocol not in get_args(ProtocolName):
        raise UnknownNameError("protocol", protocol, get_args(ProtocolName))
    template = options.get("template")
    if template is not None and options.get("mode") != "rank":
        raise ConfigurationError("The words of a manual template are ranked. Give mode='rank' too.")
    task, splits = _read(name, protocol, None if data is None else str(data), template)
    if options.get("shots") is not None:
        splits = splits.shots(int(options["shots"]), int(options.get("shots_seed") or 0))
    train, validation, test = (options.get(f"{split}_rows") for split in get_args(SplitName))
    return task, splits.limit(train, validation, test)


def backbone_for(
    name: str,
    tasks: Sequence[Task],
    revision: str | None,
    options: Mapping[str, Any],
    width: int | None = None,
) -> Backbone:
    """The backbone in the form that does some tasks: encoders with a head as wide as the most
    labels that one of them has, or of a given width.

    Raises ConfigurationError where an encoder cannot do one of them, or not all with one loss.
    """
    revision = revision if revision is not None and not revision.startswith("weights:") else None
    encoder = form_of(name, revision=revision) == "encoder"
    width = max(width or 0, _width(tasks, name)) if encoder else None
    quantise, dtype = options.get("quantise"), options.get("dtype") or "float32"
    if dtype not in _DTYPES:
        raise UnknownNameError("dtype of a backbone", str(dtype), _DTYPES)
    kept = None if quantise is None else str(quantise)
    return _loaded(name, width, revision, str(dtype), kept, int(options.get("error_rank") or 0))


def _width(tasks: Sequence[Task], backbone: str) -> int:
    widths: list[int] = []
    for task in tasks:
        if task.head_width is None:
            raise ConfigurationError(
                f"{task.name} asks for text, and {backbone} is an encoder, which answers with a "
                "class or a value. Choose an encoder-decoder or a decoder."
            )
        widths.append(task.head_width)
    if len({task.kind for task in tasks}) > 1:
        raise ConfigurationError(
            f"{', '.join(task.name for task in tasks)} ask for classes and for values, and an "
            "encoder has one loss for all rows. Train them apart, or on a text-to-text backbone."
        )
    return max(widths)


def describe(backbone: str, task: str, *, protocol: str, data: str | Path | None) -> dict[str, Any]:
    """What identifies a cell's backbone and rows beside their names: `revision` and `data`."""
    found = [rows_of(name, protocol, data, {}) for name in names_of(task)]
    said = [f"{t.name} version {t.version}, {t.digest}, {s.digest}" for t, s in found]
    return {"revision": _identity(backbone), "data": "; ".join(said)}


# One backbone serves all cells that follow each other on it: every delta leaves it as it was.
@functools.lru_cache(maxsize=1)
def _loaded(
    name: str,
    labels: int | None,
    revision: str | None,
    dtype: str,
    quantise: str | None,
    error_rank: int,
) -> Backbone:
    return load_backbone(
        name,
        labels=labels,
        dtype=getattr(torch, dtype),
        revision=revision,
        quantise=quantise,
        error_rank=error_rank,
    )


@functools.cache
def _identity(backbone: str) -> str:
    loaded = load_backbone(backbone)
    return loaded.revision or f"weights:{fingerprint(loaded.model).weights}"


@functools.lru_cache(maxsize=16)
def _read(
    name: str, protocol: ProtocolName, data: str | None, template: str | None
) -> tuple[Task, Splits]:
    task = find_task(name) if template is None else as_cloze(find_task(name), template)
    return task, task.load(data, protocol)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UnknownNameError for an option that is not in OPTIONS."""
    for name in options:
        if name not in OPTIONS:
            raise UnknownNameError("option", name, OPTIONS)
