"""One row of a task, ready for any form of backbone; and the rows of a task, split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deltatune.core.errors import ConfigurationError
from deltatune.tasks.text import digest, fraction

__all__ = ["Example", "ProtocolName", "Row", "SplitName", "Splits", "Tables"]

SplitName = Literal["train", "validation", "test"]
ProtocolName = Literal["clean", "faithful"]


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row of a source.

    Attributes:
        values: field name to value, as the source has them.
        where: the place of the row (file and line), for messages.
    """

    values: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Tables:
    """What a source holds for a task, before any protocol has cut it.

    Attributes:
        splits: split name to rows; any of train, validation and test may be missing.
        origin: where the rows came from, in a line.
        status: "complete", "partial" (fewer or other rows than published), "proxy" (other rows of
            the same kind), "local" (the user's own files) or "generated" (built at run time).
        digest: a hash of the content of the files or of the rows.
        notes: what a reader of a score must know.
        final: whether the splits are the task's own, so that no protocol may cut them anew.
    """

    splits: Mapping[SplitName, tuple[Row, ...]]
    origin: str
    status: str
    digest: str
    notes: tuple[str, ...] = ()
    final: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task, for every form.

    Attributes:
        source: the input of the text-to-text form.
        targets: the right answers of the text-to-text form; at least one.
        texts: one or two segments for an encoder; empty if the task has no such form.
        label: class index, or the value of a regression; None if the task has no such form.
        identity: 16 hexadecimal digits, a hash of all of the above.
        continues: whether the target goes on where the source ends, with nothing between them.
        turns: (role, content) of each turn of a conversation, the answer last; else empty.
    """

    source: str
    targets: tuple[str, ...]
    texts: tuple[str, ...]
    label: int | float | None
    identity: str
    continues: bool = False
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Splits:
    """The examples of a task, cut by a protocol.

    Attributes:
        train: for training.
        validation: for choosing checkpoints and settings.
        test: for the score that is reported.
        origin: where the rows came from.
        status: of the source, to be shown beside each score unless it is "complete".
        notes: what was cut, removed or is missing, one sentence each; to be shown beside each
            score, after the record's own notes.
        removed: counts of the removed rows by reason, for example {"train_in_test": 166}.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    origin: str
    status: str
    notes: tuple[str, ...] = ()
    removed: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of what each split holds, in order."""
        parts = (self.train, self.validation, self.test)
        return digest(*([example.identity for example in part] for part in parts))

    def limit(
        self,
        train: int | None = None,
        validation: int | None = None,
        test: int | None = None,
        seed: int = 0,
    ) -> Splits:
        """Returns at most so many examples of each split, drawn without replacement.

        The draw depends on the examples' own content and the seed alone; a smaller limit's examples
        are among a larger one's. None keeps the split as it is. The order of the split is kept.
        """
        wanted = {"train": train, "validation": validation, "test": test}
        notes = list(self.notes)
        parts: dict[str, tuple[Example, ...]] = {}
        for name, count in wanted.items():
            whole: tuple[Example, ...] = getattr(self, name)
            parts[name] = whole if count is None else _subsample(whole, count, seed)
            if len(parts[name]) < len(whole):
                notes.append(f"{name}: {len(parts[name])} of {len(whole)} rows drawn, seed {seed}.")
        return dataclasses.replace(
            self,
            train=parts["train"],
            validation=parts["validation"],
            test=parts["test"],
            notes=tuple(notes),
        )

    def shots(self, count: int, seed: int) -> Splits:
        """Returns so many training and so many validation examples of each label.

        The procedure is that of the paper's few-shot experiments: the training examples are
        shuffled (numpy, by the seed); the first `count` of each label, label by label as they first
        appear, are train, the next `count` are validation. Values are two groups, below the middle
        of their range and not; texts are one. Test stays.

        Raises ConfigurationError if `count` is below 1, or some label has not twice so many.
        """
        import numpy

        if count < 1:
            raise ConfigurationError(f"Expected at least 1 shot of each label, found {count}.")
        order = numpy.random.RandomState(seed).permutation(len(self.train))
        shuffled = [self.train[int(index)] for index in order]
        groups: dict[Any, list[Example]] = {}
        for example, group in zip(shuffled, _groups(shuffled), strict=True):
            groups.setdefault(group, []).append(example)
        for examples in groups.values():
            if len(examples) < 2 * count:
                raise ConfigurationError(
                    f"{count} shots and as many to validate on need {2 * count} training rows of "
                    f"each label, and {examples[0].targets[0]!r} has {len(examples)}. Take fewer."
                )
        parts = list(groups.values())
        note = f"{count} shots of each of {len(parts)} groups, drawn with seed {seed}."
        return dataclasses.replace(
            self,
            train=tuple(example for part in parts for example in part[:count]),
            validation=tuple(example for part in parts for example in part[count : 2 * count]),
            notes=(*self.notes, note),
        )


def _groups(examples: Sequence[Example]) -> list[Any]:
    labels = [example.label for example in examples]
    values = [label for label in labels if isinstance(label, float)]
    if not values:
        return labels
    middle = (min(values) + max(values)) / 2
    return [label is not None and label >= middle for label in labels]


def _subsample(examples: tuple[Example, ...], count: int, seed: int) -> tuple[Example, ...]:
    if len(examples) <= count:
        return examples
    order = sorted(
        range(len(examples)), key=lambda index: (fraction(seed, examples[index].identity), index)
    )
    return tuple(examples[index] for index in sorted(order[:count]))
