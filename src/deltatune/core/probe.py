"""What a delta does to the outputs of its model, on inputs of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.errors import UnsupportedError

__all__ = ["Probe", "outputs_of", "saying_if_idle"]


@dataclass(frozen=True)
class Probe:
    """How outputs with a delta differ from those without it.

    Attributes:
        entries: how many output numbers there are.
        changed: how many of them differ.
        difference: the largest between two of them; infinite where only one is a number.
    """

    entries: int
    changed: int
    difference: float

    @classmethod
    def between(cls, without: Tensor, there: Tensor) -> Probe:
        """Compares outputs of `outputs_of`; of longer ones, which hold virtual tokens, the end."""
        found = there if there.shape == without.shape else there[:, -without.shape[1] :]
        differ = (found != without) & ~(found.isnan() & without.isnan())
        apart = (found - without).abs().nan_to_num(torch.inf).masked_fill(~differ, 0.0)
        return cls(found.numel(), int(differ.sum()), float(apart.max()))

    def __str__(self) -> str:
        if not self.changed:
            return f"changes none of {self.entries:,} outputs"
        apart = f"{self.difference:.2g}"
        return f"changes {self.changed:,} of {self.entries:,} outputs, by at most {apart}"


def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model, or the last hidden states of one without a head, in evaluation, fp32.

    Raises UnsupportedError if it gives neither.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            made = model(**inputs)
    finally:
        model.train(was_training)
    for name in ("logits", "last_hidden_state"):
        found = getattr(made, name, None)
        if isinstance(found, Tensor):
            return found.float()
    raise UnsupportedError(f"{type(model).__name__} gives neither logits nor hidden states.")


@contextmanager
def saying_if_idle(what: str, model: Any, inputs: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Warns at its end if what was done within it changes no output; looks at nothing without
    inputs.
    """
    before = None if inputs is None else outputs_of(model, inputs)
    yield
    if inputs is not None and before is not None:
        found = Probe.between(before, outputs_of(model, inputs))
        if not found.changed:
            # 4: past this generator, contextlib and the function with the `with`.
            warnings.warn(f"{what} {found}: is it trained?", stacklevel=4)
