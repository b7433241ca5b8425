"""Looking at training data before the first step, for methods that begin from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from deltatune.core.errors import ConfigurationError
from deltatune.core.policy import Policies
from deltatune.training.batch import count_loss_items
from deltatune.training.forward import forward_context
from deltatune.training.progress import Progress, SilentProgress
from deltatune.training.step import Collate
from deltatune.training.trainable import Trainable

__all__ = ["survey"]


def survey(
    run: Trainable,
    rows: Sequence[Any],
    collate: Collate,
    *,
    precision: str = "fp32",
    order: Callable[[int], Sequence[int]] = range,
    policies: Policies | None = None,
    progress: Progress | None = None,
) -> None:
    """Sets the start of methods that begin from data, one after the other.

    `fit` and `fit_many` do this where a run begins; other loops call it before their first step.
    Slots that are frozen, trained or loaded keep what they hold. Rows are looked at one at a time;
    those without a label are left out.

    Args:
        run: on its device; it is left in evaluation mode.
        rows: of data, in any form that `collate` takes.
        collate: rows to a batch of tensors, the keyword arguments of `run`.
        precision: see `Settings`.
        order: how many rows to the indices of those that are looked at.
        policies: of the run, where it has any.
        progress: what shows the run.

    Raises:
        ConfigurationError: a method keeps what it finds with its policy, and there are none.
        TrainingError: a loss is not finite, or no row has a label.
    """
    model, memory = cast(nn.Module, run), {} if policies is None else policies.memory
    device = next(model.parameters()).device
    for one in run.surveys():
        if policies is None and one.part.method.has_policy():
            raise ConfigurationError(
                f"{one.name} keeps what it finds in the memory of its policy. Train it by `fit`, "
                "or give the policies of your run: `policies=run.policies()`."
            )
        run.eval()
        chosen = [rows[place] for place in order(min(one.wanted.rows, len(rows)))]
        (progress or SilentProgress()).say(f"{one.name} looks at {len(chosen)} rows")
        for row in chosen:
            batch = collate([row])
            items = count_loss_items(batch)
            if items:
                held = {name: value.to(device) for name, value in batch.items()}
                with forward_context(model, precision, device, batch):
                    one.look(functools.partial(run, **held), items)
        one.settle(memory.get((one.slot, one.part.key), {}))
