"""Text to token ids, once, for the three forms of backbone; and rows to padded batches.

Forms: `encoder_decoder` (source in, target out), `decoder` (source, cue and target in one sequence,
loss on the target alone; no cue where the target continues the source, and the tokenizer's own chat
template for conversations) and `encoder` (one or two segments, a class index or a value as the
label). What is longer than the limit is cut at its end and counted; `Encoding.warning` says so in a
line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from deltatune.backbones.conversation import conversation_ids
from deltatune.core.errors import ConfigurationError, UnknownNameError

__all__ = [
    "DECODER_CUE",
    "IGNORED",
    "Encodable",
    "Encoding",
    "Form",
    "Row",
    "RowOfSeveral",
    "collate",
    "collate_prompts",
    "encode",
    "encode_prompts",
    "target_ids",
]

Form = Literal["encoder_decoder", "decoder", "encoder"]

IGNORED = -100
"""The label at which torch's cross-entropy does not look."""

DECODER_CUE = "\nanswer:"
"""What stands between source and target for a decoder; the target follows after a space."""

_FORMS = ("encoder_decoder", "decoder", "encoder")


class Encodable(Protocol):
    """What encoding asks of an example."""

    @property
    def source(self) -> str:
        """The input of the text-to-text form."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The right answers of the text-to-text form; training draws one of them each time."""

    @property
    def texts(self) -> tuple[str, ...]:
        """One or two segments for an encoder."""

    @property
    def label(self) -> int | float | None:
        """Class index or value."""

    @property
    def continues(self) -> bool:
        """Whether the target goes on where the source ends: a decoder gets no cue."""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(role, content) of each turn of a conversation, the answer last; else empty."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example as token ids.

    Attributes:
        input_ids: what the model reads.
        labels: encoder_decoder: the ids of the target with its end token. decoder: as long as
            `input_ids`, IGNORED at the source. encoder: class index or value. None: nothing to
            learn from.
        token_type_ids: segment of each input token, where the tokenizer gives them.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | int | float | None
    token_type_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Tokens that the model works on: input, and output where it is a sequence of its own."""
        separate = isinstance(self.labels, tuple) and len(self.labels) != len(self.input_ids)
        return len(self.input_ids) + (len(self.labels) if separate else 0)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class RowOfSeveral(Row):
    """An example with several right answers: the row of the first, and those of the others.

    Attributes:
        others: training takes one of all of them whenever it visits the example.
    """

    others: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Encoding(Sequence[Row]):
    """Rows, and how many of them lost text.

    Attributes:
        rows: the rows, in the order of the examples.
        sources_truncated: rows whose input was longer than `maximum_source`.
        targets_truncated: rows whose target was longer than `maximum_target`.
        maximum_source: the limit in tokens.
        maximum_target: the same for targets.
    """

    rows: tuple[Row, ...]
    sources_truncated: int
    targets_truncated: int
    maximum_source: int
    maximum_target: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def warning(self) -> str | None:
        """One line that counts what was cut off, or None."""
        parts = []
        if self.sources_truncated:
            parts.append(f"{self.sources_truncated} inputs to {self.maximum_source} tokens")
        if self.targets_truncated:
            parts.append(f"{self.targets_truncated} targets to {self.maximum_target} tokens")
        if not parts:
            return None
        return f"Truncated, of {len(self)} rows: {' and '.join(parts)}."


def encode(
    examples: Sequence[Encodable],
    tokenizer: Any,
    form: Form,
    *,
    maximum_source: int,
    maximum_target: int,
) -> Encoding:
    """Returns the examples as token ids.

    Args:
        examples: with `source` and `targets`, or with `texts` and `label` for the form "encoder".
        tokenizer: a fast or slow tokenizer of transformers.
        form: of the backbone.
        maximum_source: longest input in tokens, special tokens counted; for a decoder without
            target.
        maximum_target: longest target in tokens, its end token counted.

    Raises:
        UnknownNameError: there is no such form.
        ConfigurationError: a limit is too small, the tokenizer lacks an end token, or the examples
            have no text for an encoder.
    """
    if form not in _FORMS:
        raise UnknownNameError("form", form, _FORMS)
    if maximum_source < 4 or maximum_target < 2:
        raise ConfigurationError(
            f"Expected limits of at least 4 and 2 tokens, found {maximum_source} and "
            f"{maximum_target}."
        )
    if form == "encoder":
        rows, cut = _segments(examples, tokenizer, maximum_source)
        labelled = tuple(
            Row(row.input_ids, example.label, row.token_type_ids)
            for row, example in zip(rows, examples, strict=True)
        )
        return Encoding(labelled, cut, 0, maximum_source, maximum_target)
    prompts = encode_prompts(examples, tokenizer, form, maximum_source=maximum_source)
    targets, targets_cut = _targets(examples, tokenizer, form, maximum_target)
    make = _joined if form == "decoder" else _separate
    joined = tuple(
        _of_several([make(row, answer) for answer in answers])
        for row, answers in zip(prompts, targets, strict=True)
    )
    return Encoding(joined, prompts.sources_truncated, targets_cut, maximum_source, maximum_target)


def encode_prompts(
    examples: Sequence[Encodable], tokenizer: Any, form: Form, *, maximum_source: int
) -> Encoding:
    """Returns the inputs alone, without labels: what a model answers to. See `encode`."""
    if form == "encoder":
        rows, cut = _segments(examples, tokenizer, maximum_source)
        return Encoding(rows, cut, 0, maximum_source, 0)
    sources = [example.source for example in examples]
    if _by_template(examples, tokenizer, form):
        asked = [conversation_ids(example.turns, tokenizer)[0] for example in examples]
        # What was said last is kept, and the opening of the answer.
        rows = tuple(Row(ids[-maximum_source:], None) for ids in asked)
        cut = sum(len(ids) > maximum_source for ids in asked)
        return Encoding(rows, cut, 0, maximum_source, 0)
    cue: tuple[int, ...] = ()
    if form == "decoder" and not _continues(examples):
        cue = _plain(tokenizer, DECODER_CUE)
    rows, cut = _bounded(sources, tokenizer, maximum_source - len(cue))
    if form == "decoder":
        rows = tuple(Row((*_open_ended(row, tokenizer), *cue), None) for row in rows)
    return Encoding(rows, cut, 0, maximum_source, 0)


def _continues(examples: Sequence[Encodable]) -> bool:
    return any(example.continues for example in examples)


def _by_template(examples: Sequence[Encodable], tokenizer: Any, form: Form) -> bool:
    """Whether these are conversations for the tokenizer's own chat template."""
    turns = any(example.turns for example in examples)
    return form == "decoder" and turns and bool(getattr(tokenizer, "chat_template", None))


def _open_ended(row: Row, tokenizer: Any) -> tuple[int, ...]:
    # Some tokenizers end every text with the end token; a prompt goes on.
    ended = row.input_ids[-1:] == (tokenizer.eos_token_id,)
    return row.input_ids[:-1] if ended else row.input_ids


def _separate(prompt: Row, target: tuple[int, ...]) -> Row:
    return Row(prompt.input_ids, target)


def _joined(prompt: Row, target: tuple[int, ...]) -> Row:
    ids = prompt.input_ids
    return Row((*ids, *target), (*(IGNORED for _ in ids), *target))


def _plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def target_ids(
    tokenizer: Any, form: Form, target: str, *, continues: bool = False
) -> tuple[int, ...]:
    """Returns the ids of a target as the form is trained on it, end token included."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError(
            "The tokenizer has no end token (eos_token), so a generated answer could not end. Set "
            "one."
        )
    text = f" {target}" if form == "decoder" and not continues else target
    return (*_plain(tokenizer, text), end)


def _targets(
    examples: Sequence[Encodable], tokenizer: Any, form: Form, maximum: int
) -> tuple[list[list[tuple[int, ...]]], int]:
    """Each example's targets, and how many examples have one that is too long."""
    if _by_template(examples, tokenizer, form):
        whole = [[conversation_ids(example.turns, tokenizer)[1]] for example in examples]
    else:
        goes_on = _continues(examples)
        texts = dict.fromkeys(target for example in examples for target in example.targets)
        by_text = {text: target_ids(tokenizer, form, text, continues=goes_on) for text in texts}
        whole = [[by_text[target] for target in example.targets] for example in examples]
    cut = sum(any(len(ids) > maximum for ids in answers) for answers in whole)
    return [[_ended(ids, maximum) for ids in answers] for answers in whole], cut


def _ended(ids: tuple[int, ...], maximum: int) -> tuple[int, ...]:
    # The end token stays, so that the model learns to end where its room does.
    return ids if len(ids) <= maximum else (*ids[: maximum - 1], ids[-1])


def _of_several(rows: list[Row]) -> Row:
    first, *others = rows
    if not others:
        return first
    return RowOfSeveral(first.input_ids, first.labels, first.token_type_ids, tuple(others))


def _segments(
    examples: Sequence[Encodable], tokenizer: Any, maximum: int
) -> tuple[tuple[Row, ...], int]:
    counts = {len(example.texts) for example in examples}
    if not counts <= {1, 2} or len(counts) > 1:
        raise ConfigurationError(
            f"An encoder needs one or two texts in every example, found {sorted(counts)}. This "
            "task has "
            "no form for an encoder: use an encoder-decoder or a decoder."
        )
    first = [example.texts[0] for example in examples]
    second = [example.texts[1] for example in examples] if counts == {2} else None
    return _bounded(first, tokenizer, maximum, second)


def _bounded(
    texts: Sequence[str], tokenizer: Any, maximum: int, second: Sequence[str] | None = None
) -> tuple[tuple[Row, ...], int]:
    if not texts:
        return (), 0
    pairs = None if second is None else list(second)
    whole = tokenizer(list(texts), pairs, verbose=False)
    too_long = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > maximum]
    rows = [_row(whole, index) for index in range(len(texts))]
    if too_long:
        shorter = tokenizer(
            [texts[index] for index in too_long],
            None if pairs is None else [pairs[index] for index in too_long],
            truncation="longest_first",
            max_length=maximum,
            verbose=False,
        )
        for position, index in enumerate(too_long):
            rows[index] = _row(shorter, position)
    return tuple(rows), len(too_long)


def _row(encoded: Any, index: int) -> Row:
    types = encoded.get("token_type_ids")
    return Row(
        tuple(encoded["input_ids"][index]), None, None if types is None else tuple(types[index])
    )


def _padding(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    # Padding is masked everywhere, so any token will do.
    return 0


def _padded(rows: Sequence[Sequence[int]], filling: int, *, left: bool = False) -> Tensor:
    width = max(len(row) for row in rows)
    lines = []
    for row in rows:
        gap = [filling] * (width - len(row))
        lines.append([*gap, *row] if left else [*row, *gap])
    return torch.tensor(lines, dtype=torch.long)


def _inputs(rows: Sequence[Row], tokenizer: Any, *, left: bool = False) -> dict[str, Tensor]:
    ids = [row.input_ids for row in rows]
    batch = {
        "input_ids": _padded(ids, _padding(tokenizer), left=left),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0, left=left),
    }
    types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    if types:
        batch["token_type_ids"] = _padded(types, 0, left=left)
    return batch


def collate(rows: Sequence[Row], tokenizer: Any, form: Form) -> dict[str, Tensor]:
    """Returns a batch for training.

    Returns:
        `input_ids`, `attention_mask` [rows, longest], where the tokenizer gives them
        `token_type_ids`;
        `labels`: [rows, longest target] or [rows, longest], padded with IGNORED, for the
        text-to-text forms; [rows] of int64 classes or float32 values for an encoder; absent if a
        row has none.
    """
    batch = _inputs(rows, tokenizer)
    if any(row.labels is None for row in rows):
        return batch
    if form == "encoder":
        values: list[Any] = [row.labels for row in rows]
        number = torch.float32 if any(isinstance(value, float) for value in values) else torch.long
        return {**batch, "labels": torch.tensor(values, dtype=number)}
    sequences = [row.labels for row in rows if isinstance(row.labels, tuple)]
    return {**batch, "labels": _padded(sequences, IGNORED)}


def collate_prompts(rows: Sequence[Row], tokenizer: Any, form: Form) -> dict[str, Tensor]:
    """Returns a batch to answer to: inputs alone; a decoder's are padded on the left."""
    return _inputs(rows, tokenizer, left=form == "decoder")
