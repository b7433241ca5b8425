"""Looking at training data before the first step, for methods that begin from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from deltatune.core.survey import Survey
from deltatune.training.batch import count_loss_items
from deltatune.training.forward import forward_context
from deltatune.training.step import Collate
from deltatune.training.trainable import Trainable

__all__ = ["survey"]


def survey(
    run: Trainable, wanted: Survey, rows: Sequence[Any], collate: Collate, precision: str
) -> None:
    """Shows rows to a survey, one at a time; those without a label are left out.

    Args:
        run: on its device; it is left in evaluation mode.
        wanted: one of `run.surveys()`.
        rows: of the training data.
        collate: rows to a batch of tensors, the keyword arguments of `run`.
        precision: see `Settings`.

    Raises TrainingError for a loss that is not finite.
    """
    run.eval()
    model = cast(nn.Module, run)
    device = next(model.parameters()).device
    for row in rows:
        batch = collate([row])
        items = count_loss_items(batch)
        if items:
            held = {name: value.to(device) for name, value in batch.items()}
            with forward_context(model, precision, device, batch):
                wanted.look(functools.partial(run, **held), items)
