"""What a task's rows are like before anything is trained on them: lengths, labels, what is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any, get_args

from deltatune.backbones.encoding import Form, encode_prompts, target_ids
from deltatune.backbones.load import Backbone
from deltatune.execution.goals import Goal
from deltatune.tasks.example import Example, SplitName, Splits
from deltatune.tasks.task import Task

__all__ = ["check_rows"]

_MOST = 2000  # rows of a split that are looked at
_ANY_LENGTH = 1 << 30


def check_rows(task: Task, splits: Splits, backbone: Backbone) -> dict[str, Any]:
    """What is to be known of a task's rows before training, at most 2,000 of each split.

    Args:
        task: the record.
        splits: its rows.
        backbone: whose tokenizer and form count.

    Returns:
        `limits` of the record in tokens; for each split in `splits` the median, 95th percentile and
        largest of `source` and `target` lengths in tokens, the share of rows that are `cut` at the
        limits, and the shares of the `labels`; `majority`, the score of always giving the commonest
        label of train, None where there are none.

    Raises:
        ConfigurationError: the backbone is an encoder and the task has no form for one.
    """
    looked_at = splits.limit(_MOST, _MOST, _MOST)
    limits = task.lengths
    parts = {
        name: _lengths(task, getattr(looked_at, name), backbone) for name in get_args(SplitName)
    }
    return {
        "limits": {"source": limits.source, "target": limits.target},
        "splits": parts,
        "majority": Goal(task, splits).majority,
    }


def _lengths(task: Task, examples: Sequence[Example], backbone: Backbone) -> dict[str, Any]:
    tokenizer, form = backbone.tokenizer, backbone.form
    prompts = encode_prompts(examples, tokenizer, form, maximum_source=_ANY_LENGTH)
    sources = [len(row.input_ids) for row in prompts]
    targets = [0] * len(examples) if form == "encoder" else _targets(examples, tokenizer, form)
    cut = [
        source > task.lengths.source or target > task.lengths.target
        for source, target in zip(sources, targets, strict=True)
    ]
    counts = Counter(example.targets[0] for example in examples if task.labels)
    return {
        "rows": len(examples),
        "source": _spread(sources),
        "target": _spread(targets),
        "cut": sum(cut) / len(cut),
        "labels": {label: counts[label] / len(examples) for label in task.labels},
    }


def _targets(examples: Sequence[Example], tokenizer: Any, form: Form) -> list[int]:
    continues = any(example.continues for example in examples)
    return [
        max(len(target_ids(tokenizer, form, text, continues=continues)) for text in one.targets)
        for one in examples
    ]


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    high = quantiles(lengths, n=20, method="inclusive")[-1] if len(lengths) > 1 else lengths[0]
    return {"median": median(lengths), "95 %": high, "largest": max(lengths)}
