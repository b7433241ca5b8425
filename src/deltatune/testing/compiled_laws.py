"""The law of compiled models, apart from the others: tracing one takes 5 to 70 seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.testing.case import Case, close, close_gradients, move

__all__ = ["law_compiled"]


def law_compiled(case: Case, folder: Path) -> None:
    """A model compiled as one graph before it got the delta gives what the model itself gives,
    gradients too; and the base again when the delta is gone.
    """
    del folder
    torch._dynamo.reset()
    model = case.model()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    base = case.logits(compiled)
    delta = api.attach(model, case.expression)
    move(delta)
    # The compiled one first: nothing that a forward finds out may be found out by tracing.
    (found, gradients), (expected, wanted) = (_both(case, m, delta) for m in (compiled, model))
    close(found, expected)
    close_gradients(gradients, wanted)
    delta.detach()
    close(case.logits(compiled), base)


def _both(case: Case, model: Any, delta: Delta) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of all that is trained."""
    for row in delta.bank.slots:
        row.grad = None
    logits = case.kin.logits(model, case.kin.batch())
    torch.autograd.backward(logits.square().sum())
    found = [row.grad.flatten() for row in delta.bank.slots if row.grad is not None]
    return logits.detach(), torch.cat(found)
