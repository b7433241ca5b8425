"""A task: one versioned record from which every form of it follows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from deltatune.core.errors import DataError, UnknownNameError, nearest
from deltatune.tasks.example import Example, ProtocolName, Row, Splits
from deltatune.tasks.metrics import METRICS
from deltatune.tasks.specification import (
    Lengths,
    PairPreparation,
    Provenance,
    Record,
    SourceSpecification,
    SplitRule,
)
from deltatune.tasks.templates import evaluate, render, variables, variables_of_expression
from deltatune.tasks.text import digest, fraction
from deltatune.tasks.turns import read_turns

if TYPE_CHECKING:
    from deltatune.tasks.sources import Source

__all__ = ["Task"]

_PAIR_FIELDS = ("first", "second", "choice")
_PAIR_SEED = 42


class Task(Record):
    """A task, as data.

    Attributes:
        name: unique name, lower case; for tasks of Table 1 the `task_id`.
        version: raised with every change that can change a score.
        title: the name that the paper prints.
        kind: what the answer is.
        metric: name of the metric that is the task's own.
        provenance: where it comes from.
        source: where its rows are when no local folder holds them.
        rows_of: a task with the same rows, whose folder serves where there is none of this name.
        fields: the fields of a raw row that are used. Templates write `_` for a `-` in a name.
        prepare: fields made from others, before anything else.
        derive: further fields: name to an expression over the raw ones.
        keep: an expression; rows for which it is false, empty or none are left out before any
            split is cut.
        template: the input of the text-to-text form.
        target: the answer of the text-to-text form; classification tasks answer with the label
            word.
        answers: an expression that gives a list of right answers, in place of `target`. Training
            draws one of them at random whenever it visits the row, evaluation takes the best.
        texts: one or two segments for an encoder; empty if the task has no such form.
        label: field of the class index or value.
        labels: the label words, in the order of the class indices.
        source_labels: what the source calls them, in the order of *its* indices, where that is
            another order than that of `labels`; the same words, of which one may stand for several
            of the source's classes.
        known_as: what rows call the labels, in their order, where that is not the label words.
        splits: how the protocol "faithful" cuts.
        drop_empty: whether rows whose input is empty are left out.
        continues: whether the target goes on where the input ends, so that a decoder gets no cue
            between them.
        turns: field that holds a conversation, a list of turns with `role` and `content`; its last
            turn is the answer, and a tokenizer's own chat template takes the place of `template`.
        lengths: sizes in tokens.
        notes: to be shown beside every score.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_\-]*$")
    version: int = Field(ge=1)
    title: str
    kind: Literal["classification", "regression", "generation"]
    metric: str
    provenance: Provenance
    source: SourceSpecification
    rows_of: str | None = None
    fields: tuple[str, ...]
    prepare: PairPreparation | None = None
    derive: dict[str, str] = Field(default_factory=dict)
    keep: str | None = None
    template: str
    target: str | None = None
    answers: str | None = None
    texts: tuple[str, ...] = Field(default=(), max_length=2)
    label: str | None = None
    labels: tuple[str, ...] = ()
    source_labels: tuple[str, ...] = ()
    known_as: tuple[str, ...] = ()
    splits: SplitRule | None = None
    drop_empty: bool = False
    continues: bool = False
    turns: str | None = None
    lengths: Lengths = Lengths()
    notes: tuple[str, ...] = ()

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, metric: str) -> str:
        if metric not in METRICS:
            raise UnknownNameError("metric", metric, METRICS)
        return metric

    @model_validator(mode="after")
    def _parts_fit(self) -> Task:
        raw = {_spelled(name) for name in self.fields}
        raw |= {*(_PAIR_FIELDS if self.prepare else ())}
        known = raw | {*self.derive}
        asked = [*self._in_inputs, *self._in_answer]
        asked += variables_of_expression(self.keep) if self.keep else ()
        for names, there in ((self._in_derived(self.derive), raw), (asked, known)):
            for name in names:
                if name not in there:
                    raise UnknownNameError("field", name, there)
        if self.turns is not None and self.turns not in known:
            raise UnknownNameError("field", self.turns, known)
        self._check_kind()
        return self

    def _check_kind(self) -> None:
        if self.kind == "classification":
            if self.label is None or len(self.labels) < 2:
                raise ValueError("a classification task needs `label` and at least two `labels`")
            if len(set(self.labels)) != len(self.labels):
                raise ValueError("two of the `labels` are the same word")
            if self.target is not None or self.answers is not None:
                raise ValueError("a classification task answers with its label word: no `target`")
            if self.known_as and len(self.known_as) != len(self.labels):
                raise ValueError("`known_as` needs a name for each of the `labels`")
            if self.source_labels and set(self.source_labels) != set(self._names):
                raise ValueError("`source_labels` and `labels` must be the same words")
            return
        if (self.target is None) == (self.answers is None):
            raise ValueError(f"a task of kind {self.kind!r} needs a `target`, or `answers`")
        if self.labels or self.source_labels:
            raise ValueError(f"a task of kind {self.kind!r} has no `labels`")
        if (self.label is None) != (self.kind == "generation"):
            raise ValueError("`label` is needed for regression and has no meaning for generation")

    @property
    def digest(self) -> str:
        """A hash of everything in the record that can change a score; the rows have their own."""
        unrelated = ("title", "provenance", "source", "rows_of", "notes")
        # Fields younger than some records count only where they are set.
        younger = ("continues", "turns", "derive", "keep", "answers", "known_as")
        left_out: dict[str, Any] = dict.fromkeys(unrelated, True)
        left_out |= {name: True for name in younger if not getattr(self, name)}
        if self.splits is not None:
            unset = {name for name in ("sample", "shares") if getattr(self.splits, name) is None}
            left_out["splits"] = unset
        return digest(self.model_dump(mode="json", exclude=left_out))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The raw fields that make the input; two rows are the same row if these are."""
        if self.prepare is not None:
            return (self.prepare.good, self.prepare.bad)
        return self._raw(self._in_inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The raw fields that make the answer and no input: empty in rows without an answer."""
        if self.prepare is not None:
            return ()
        inputs = self.inputs
        return tuple(name for name in self._raw(self._in_answer) if name not in inputs)

    @property
    def _in_inputs(self) -> frozenset[str]:
        return frozenset().union(*(variables(text) for text in (self.template, *self.texts)))

    @property
    def _in_answer(self) -> frozenset[str]:
        found = variables(self.target or "") | ({self.label} if self.label else set())
        return found | variables_of_expression(self.answers) if self.answers else found

    def _in_derived(self, names: Collection[str]) -> frozenset[str]:
        used = (variables_of_expression(self.derive[name]) for name in names)
        return frozenset().union(*used)

    def _raw(self, names: frozenset[str]) -> tuple[str, ...]:
        names |= self._in_derived(names & self.derive.keys())
        return tuple(name for name in self.fields if _spelled(name) in names)

    @property
    def has_head(self) -> bool:
        """Whether an encoder with a head can do the task."""
        return bool(self.texts) and self.label is not None

    @property
    def head_width(self) -> int | None:
        """Outputs of an encoder's head: one per label, 1 for regression, None without a head."""
        if not self.has_head:
            return None
        return 1 if self.kind == "regression" else len(self.labels)

    def example(self, row: Row) -> Example:
        """Returns `row` in every form.

        Raises:
            DataError: a field is missing or null, or the label is not in the set; names file and
                line.
        """
        values = self._values(row)
        turns = () if self.turns is None else read_turns(values[self.turns], row.where)
        source = render(self.template, values, row.where)
        texts = tuple(render(text, values, row.where) for text in self.texts)
        label: int | float | None = None
        if self.label is not None:
            label = self._label(values[self.label], row.where)
        targets = self._targets(values, label, row.where)
        identity = digest(source, targets, texts, label)
        return Example(source, targets, texts, label, identity, self.continues, turns)

    def keeps(self, row: Row) -> bool:
        """Whether the record keeps `row`. Raises DataError if a field is missing or null."""
        return not self.keep or bool(evaluate(self.keep, self._values(row), row.where))

    def _targets(
        self, values: Mapping[str, Any], label: int | float | None, where: str
    ) -> tuple[str, ...]:
        if self.kind == "classification":
            return (self.labels[int(label or 0)],)
        if self.answers is None:
            return (render(self.target or "", values, where),)
        found = evaluate(self.answers, values, where)
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise DataError(f"{where}: the answers {found!r} are not a list.")
        texts = tuple(dict.fromkeys(str(answer) for answer in found))
        if not texts:
            raise DataError(f"{where}: there is no answer. Give at least one.")
        return texts

    def _values(self, row: Row) -> Mapping[str, Any]:
        for name in self.fields:
            if name not in row.values:
                raise DataError(f"{row.where}: {UnknownNameError('column', name, row.values)}")
            if row.values[name] is None:
                raise DataError(f"{row.where}: the column {name!r} is empty. Give it a value.")
        values = {_spelled(name): row.values[name] for name in self.fields}
        if self.prepare is not None:
            pair = (values[self.prepare.good], values[self.prepare.bad])
            choice = int(fraction(_PAIR_SEED, *pair) < 0.5)
            values |= {"first": pair[choice], "second": pair[1 - choice], "choice": choice}
        made = {name: evaluate(text, values, row.where) for name, text in self.derive.items()}
        return values | made

    def _label(self, value: Any, where: str) -> int | float:
        if self.kind == "regression":
            try:
                return float(value)
            except (TypeError, ValueError):
                raise DataError(f"{where}: the label {value!r} is not a number.") from None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        names = self._names
        if str(value) in names:
            return names.index(str(value))
        order = self.source_labels or names
        index = _index(value)
        if index is not None and index < len(order):
            return names.index(order[index])
        close = nearest(str(value), names)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"{where}: the label {value!r} is not one of {list(names)}, nor an index of them.{hint}"
        )

    @property
    def _names(self) -> tuple[str, ...]:
        """What rows call the labels."""
        return self.known_as or self.labels

    def load(
        self, source: Source | str | Path | None = None, protocol: ProtocolName = "clean"
    ) -> Splits:
        """Returns the examples of the task, split.

        Args:
            source: a source, a folder as `sources.folder` reads it, the word "hub", or None: the
                folder named by the environment variable DELTATUNE_DATA if it has the task, else the
                source of the record.
            protocol: "clean" or "faithful", see `tasks.splits`.

        Raises:
            DataError: the source lacks the task, or a file, column or label in it cannot be used.
        """
        from deltatune.tasks.sources import open_source
        from deltatune.tasks.splits import cut

        return cut(self, open_source(self, source).read(self), protocol)

    def label_words(self, labels: Sequence[int]) -> list[str]:
        """Returns the label words of class indices."""
        return [self.labels[label] for label in labels]


def _spelled(name: str) -> str:
    """A field's name as templates write it."""
    return name.replace("-", "_")


def _index(value: Any) -> int | None:
    if isinstance(value, bool | int):
        return int(value) if value >= 0 else None
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else None
