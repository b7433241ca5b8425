"""Gradients of every row of a batch: each row reads a copy of the delta of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deltatune.core.attaching import attach
from deltatune.core.bank import Bank
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import ConfigurationError, StateError

__all__ = ["Batch", "Read", "copies", "gradients", "logits_of", "outputs", "pieces"]

Batch = Mapping[str, Tensor]
Read = Callable[[Any], Tensor]


def logits_of(output: Any) -> Tensor:
    """What a model gives: its logits, or itself where it is a tensor."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


@contextmanager
def copies(delta: Delta, slot: int, count: int) -> Iterator[Delta]:
    """Within it so many copies of one slot act in place of the delta, in evaluation mode.

    Raises StateError unless the delta is attached, alone and not merged.
    """
    delta.check_slot(slot)
    if not delta.attached or delta.merged or len(deltas_of(delta.model)) > 1:
        raise StateError(
            f"{delta.name} must be attached, alone and not merged, for its posterior: every row is "
            "sent through a copy of it."
        )
    held, was_training = delta.tensors(slot), delta.model.training
    with delta.active(False):
        delta.model.eval()
        copy = attach(delta.model, [delta.expressions[slot]] * count)
        try:
            for place in range(count):
                copy.bank.write(place, held)
            yield copy.eval()
        finally:
            copy.detach()
            delta.model.train(was_training)


def pieces(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch without its labels, so many rows at a time."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    size = len(next(iter(inputs.values())))
    for start in range(0, size, rows):
        yield {name: value[start : start + rows] for name, value in inputs.items()}


def outputs(copy: Delta, batch: Batch, read: Read) -> Tensor:
    """Logits [rows, classes] of a piece, with the graph.

    Raises ConfigurationError for those of another form.
    """
    device = copy.bank.slots[0].device
    size = len(next(iter(batch.values())))
    with torch.enable_grad(), copy.route(range(size)):
        logits = read(copy.model(**{name: value.to(device) for name, value in batch.items()}))
    if logits.dim() != 2 or len(logits) != size:
        raise ConfigurationError(
            f"A posterior needs logits [rows, classes]; {tuple(logits.shape)} were read for {size} "
            "rows. Give `read`, which takes them from what the model gives."
        )
    return logits.float()


def gradients(copy: Delta, logits: Tensor, along: Tensor) -> dict[str, Tensor]:
    """Of each leaf the gradients of every row's along · logits, [rows, *shape], fp64, on the CPU.

    Args:
        copy: see `copies`.
        logits: of `outputs`; their graph is kept.
        along: [rows, classes].
    """
    bank = copy.bank
    assert isinstance(bank, Bank)
    read = list(bank.slots)[: len(logits)]
    found = torch.autograd.grad(logits, read, along.to(logits), retain_graph=True)
    return bank.own.split(torch.stack(found).cpu().double())
