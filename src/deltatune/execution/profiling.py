"""What a training step of a cell costs, on rows of a given number and length."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from deltatune.backbones.encoding import Row
from deltatune.core.delta import Delta
from deltatune.core.run import Run
from deltatune.training.profile import profile
from deltatune.training.settings import Settings
from deltatune.training.step import Collate

__all__ = ["profiled"]


def profiled(
    delta: Delta,
    rows: Sequence[Row],
    collate: Collate,
    settings: Settings,
    options: Mapping[str, Any],
) -> dict[str, float]:
    """Returns the fields of a `Profile` by name, "profile static" and so on.

    Nothing where `options` has no `profile_rows`; that of no step where it is 0. What is trained
    changes.

    Args:
        delta: attached.
        rows: whose text is joined and cut into rows of `profile_tokens` tokens.
        collate: rows to a batch.
        settings: of the training.
        options: of the cell.
    """
    count = options.get("profile_rows")
    if count is None:
        return {}
    batch = _batch(rows, collate, int(count), int(options.get("profile_tokens") or 128))
    found = profile(Run(delta), batch, settings)
    counted = {**asdict(found), "counted": found.counted}
    return {f"profile {name}": float(value) for name, value in counted.items()}


def _batch(
    rows: Sequence[Row], collate: Collate, count: int, length: int
) -> Mapping[str, Tensor] | None:
    if not count:
        return None
    ids = itertools.chain.from_iterable(row.input_ids for row in itertools.cycle(rows))
    made = []
    for row in itertools.islice(itertools.cycle(rows), count):
        text = tuple(itertools.islice(ids, length))
        # A decoder has a label for each token, an encoder-decoder for each of its answer.
        alike = isinstance(row.labels, tuple) and len(row.labels) == len(row.input_ids)
        made.append(Row(text, text if alike else row.labels))
    return collate(made)
