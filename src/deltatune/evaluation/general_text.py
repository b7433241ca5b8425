"""How well a model still predicts text in general: its own pretraining loss on texts of no task.

An encoder-decoder with sentinels fills spans that were cut out (Raffel et al. 2020, section 3.1.4:
15 % of the tokens, in spans of three), a decoder predicts each next token. What is cut out depends
on a text's own content alone, so that two models, or one with and without a delta, are asked the
same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deltatune.backbones.encoding import Row, collate
from deltatune.backbones.load import Backbone
from deltatune.core.errors import DataError, UnsupportedError
from deltatune.tasks.sources.reading import read_rows
from deltatune.tasks.text import fraction

__all__ = ["cut_out", "general_loss", "read_texts"]

NOISE, SPAN = 0.15, 3
FIELD = "text"


def read_texts(path: Path, most: int) -> tuple[str, ...]:
    """Returns the field `text` of the first rows of a data file. Raises DataError without any."""
    texts = [str(row.values[FIELD]) for row in read_rows(path)[:most] if row.values.get(FIELD)]
    if not texts:
        raise DataError(f"{path}: its rows have no field {FIELD!r}. Give a file of texts.")
    return tuple(texts)


def cut_out(
    ids: Sequence[int], sentinels: Sequence[int], key: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what is left of a text, with a sentinel for each span that was cut out, and those
    spans, each behind its sentinel.

    Args:
        ids: the text in tokens, at least two.
        sentinels: ids in the order of their numbers; as many spans are cut out at most.
        key: in [0, 1); decides which tokens.
    """
    noise = max(1, round(NOISE * len(ids)))
    spans = max(1, min(round(noise / SPAN), len(sentinels), len(ids) - noise))
    drawn = random.Random(key)
    lengths = _parts(noise, spans, drawn)
    gaps = _parts(len(ids) - noise, spans, drawn)
    left, cut, place = list[int](), list[int](), 0
    for sentinel, gap, length in zip(sentinels, gaps, lengths, strict=False):
        left += [*ids[place : place + gap], sentinel]
        cut += [sentinel, *ids[place + gap : place + gap + length]]
        place += gap + length
    return tuple(left), tuple(cut)


@torch.no_grad()
def general_loss(
    backbone: Backbone, texts: Sequence[str], *, maximum: int = 128, batch_size: int = 16
) -> float:
    """Returns the mean loss of a token to predict, in nats, of a model as it is.

    Args:
        backbone: with whatever is attached to it; put in evaluation mode.
        texts: of which the first tokens are taken.
        maximum: how many of each.
        batch_size: texts at once.

    Raises:
        UnsupportedError: an encoder, which predicts no text, or no sentinels.
    """
    rows = list(_rows(backbone, texts, maximum))
    model: Any = backbone.model
    device, training = next(model.parameters()).device, model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], backbone.tokenizer, backbone.form)
        labels = batch["labels"] if backbone.form == "encoder_decoder" else batch["labels"][:, 1:]
        tokens = int((labels >= 0).sum())
        inputs = {name: value.to(device) for name, value in batch.items()}
        total += float(model(**inputs).loss) * tokens
        count += tokens
    model.train(training)
    return total / count


def _rows(backbone: Backbone, texts: Sequence[str], maximum: int) -> Iterator[Row]:
    tokenizer: Any = backbone.tokenizer
    if backbone.form == "encoder":
        raise UnsupportedError(
            "An encoder has no head that predicts text, and none is made up. Measure forgetting on "
            "a text-to-text backbone or a decoder."
        )
    found = tokenizer(list(texts), truncation=True, max_length=maximum, add_special_tokens=False)
    whole = ((text, tuple(ids)) for text, ids in zip(texts, found["input_ids"], strict=True))
    kept = ((text, ids) for text, ids in whole if len(ids) > 1)
    if backbone.form == "decoder":
        yield from (Row(ids, ids) for _, ids in kept)
        return
    names = [f"<extra_id_{number}>" for number in range(100)]
    sentinels = [tokenizer.convert_tokens_to_ids(name) for name in names]
    known = [each for each in sentinels if each is not None and each != tokenizer.unk_token_id]
    if not known:
        raise UnsupportedError(
            "The tokenizer has no sentinels (<extra_id_0>), so that no spans can be cut out. "
            "Measure forgetting on a T5 or a decoder."
        )
    end = tokenizer.eos_token_id
    for text, ids in kept:
        left, cut = cut_out(ids, known, fraction(text))
        yield Row((*left, end), (*cut, end))


def _parts(total: int, count: int, drawn: random.Random) -> list[int]:
    """A number as so many numbers from 1 on, all ways equally likely."""
    ends = [0, *sorted(drawn.sample(range(1, total), count - 1)), total]
    return [second - first for first, second in itertools.pairwise(ends)]
