"""What can be trained: the protocol that `fit` asks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from deltatune.core.policy import Policies
from deltatune.core.survey import Survey

__all__ = ["Trainable"]


class Trainable(Protocol):
    """A model and what is trained on it, as an `nn.Module`.

    Attributes:
        base_dropout: whether the frozen base drops out in training; set by `fit` from the settings.
    """

    base_dropout: bool

    def __call__(self, **batch: Tensor) -> Any:
        """The model's forward pass; the result has a `loss`, a mean over the batch."""

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The groups for a torch optimiser.

        A group may hold a `lr` of its own, and a `slot`: groups of one slot are clipped together. A
        group without it is clipped by itself, so that runs which share a base are never coupled. It
        may hold `factors`, (start, stop, factor) each: those entries of its flat parameters train
        at so many times the rate of the group.
        """

    def trainable_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the model: every tensor that training changes."""

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets those tensors in place."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a step, once; None for nothing."""

    def policies(self) -> Policies:
        """What happens on the events of a step beside the optimiser."""

    def surveys(self) -> Sequence[Survey]:
        """What must be seen of the training data before the first step."""

    def set_step(self, step: int) -> None:
        """Called before each forward pass, with its number from 0; dropout is keyed by it.

        Without accumulation this is the number of the optimiser step. With it the number goes on
        within a step, because two parts of a batch must not drop the same entries.
        """

    def train(self, mode: bool = True) -> Any:
        """Puts the run into training; the frozen base only if `base_dropout`."""

    def eval(self) -> Any:
        """Puts the run into evaluation."""
