"""What a batch holds: how many tokens, and over how many items its loss is a mean."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError

__all__ = [
    "IGNORED",
    "count_loss_items",
    "count_tokens",
    "describe_tensors",
    "digest_rows",
    "loss_items",
    "row_ids",
    "row_length",
    "visited",
]

IGNORED = -100  # the label that torch's cross entropy leaves out


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """The input tokens of a batch, without padding and without targets; 0 if it holds none."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def count_loss_items(batch: Mapping[str, Tensor]) -> int:
    """The items over which the model takes the mean: target tokens, or rows where a label is a
    row's.

    For a decoder this takes the first token of a row to have no label, as it is with a prompt.
    """
    labels = batch.get("labels")
    return len(next(iter(batch.values()))) if labels is None else int(loss_items(labels).sum())


def loss_items(labels: Tensor) -> Tensor:
    """[rows], over how many items each row's loss is a sum: target tokens, or the row itself."""
    if labels.dim() > 1 and not labels.is_floating_point():
        return (labels != IGNORED).sum(1)
    return torch.ones(len(labels), dtype=torch.long, device=labels.device)


def row_ids(row: Any) -> Sequence[int]:
    """The input tokens of a row. Raises ConfigurationError if it has none."""
    found = row.get("input_ids") if isinstance(row, Mapping) else getattr(row, "input_ids", None)
    if found is None:
        raise ConfigurationError(
            "length_grouped, tokens_per_pass and packing need rows with input_ids. Found a row of "
            f"type {type(row).__name__!r}. Leave them out, or give encoded rows."
        )
    ids: Sequence[int] = found
    return ids


def row_length(row: Any) -> int:
    """The number of input tokens of a row. Raises ConfigurationError if it has none."""
    return len(row_ids(row))


def visited(row: Any, seed: int, step: int, place: int) -> Any:
    """The row as a visit finds it: one of itself and its `others`, where it has any.

    Which one follows from the seed of the run, the step and the row's place alone.
    """
    others: Sequence[Any] = getattr(row, "others", ())
    if not others:
        return row
    drawn = random.Random(f"{seed} {step} {place}").randrange(len(others) + 1)
    return others[drawn - 1] if drawn else row


def digest_rows(rows: Sequence[Any]) -> str:
    """A digest of all rows, so that a run never goes on with other data.

    Raises ConfigurationError if a row does not show its values in its `repr`.
    """
    whole = hashlib.blake2b(digest_size=16)
    for row in rows:
        if repr(row) == object.__repr__(row):
            raise ConfigurationError(
                f"Rows of type {type(row).__name__!r} cannot be recognised when a run goes on, "
                "because their repr does not show their values. Use a dataclass, or give no folder."
            )
        whole.update(repr(row).encode())
        whole.update(b"\n")
    return f"{len(rows)} rows, {whole.hexdigest()}"


def describe_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The number of tensors and a digest of their names, shapes and dtypes."""
    lines = [f"{name} {tuple(held.shape)} {held.dtype}" for name, held in sorted(tensors.items())]
    whole = hashlib.blake2b("\n".join(lines).encode(), digest_size=8)
    return f"{len(tensors)} tensors, {whole.hexdigest()}"
