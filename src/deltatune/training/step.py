"""One optimiser step: forward and backward over the parts of a batch, check, clip, step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from deltatune.core.errors import TrainingError
from deltatune.training.batch import count_loss_items, count_tokens, row_length, visited
from deltatune.training.forward import forward_context
from deltatune.training.optim import clip, move
from deltatune.training.packing import Packing
from deltatune.training.parts import cut
from deltatune.training.random_state import seed_forward
from deltatune.training.settings import Settings
from deltatune.training.state import RunState
from deltatune.training.trainable import Trainable

__all__ = ["Chosen", "Collate", "StepTaker", "Taken"]

Collate = Callable[[Sequence[Any]], Mapping[str, Tensor]]

_SHOWN_ROWS = 16


@dataclass(frozen=True)
class Chosen:
    """What a step is taken on.

    Attributes:
        rows: indices into the training data.
        learning_rate: the largest over the parameter groups.
        done: the fraction of the budget that was spent before.
    """

    rows: Sequence[int]
    learning_rate: float
    done: float


@dataclass(frozen=True)
class Taken:
    """What a step gave.

    Attributes:
        loss: the mean over the rows of the step.
        gradient_norm: before clipping, the largest over the slots.
        learning_rate: the largest over the parameter groups.
    """

    loss: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True)
class StepTaker:
    """Takes steps; what it changes is the state it is given, and the tensors of the run.

    Attributes:
        run: what is trained.
        rows: the training data.
        collate: rows to a batch.
        settings: how to train.
        accelerator: gives device and backward.
        packing: how forward passes are packed; None: they are not.
    """

    run: Trainable
    rows: Sequence[Any]
    collate: Collate
    settings: Settings
    accelerator: Accelerator
    packing: Packing | None = None

    def packed(self) -> contextlib.AbstractContextManager[None]:
        """Within it forward passes are packed, if the settings say so."""
        return contextlib.nullcontext() if self.packing is None else self.packing.on()

    def take(self, state: RunState, factor: float, done: float) -> Taken:
        """Takes the next step of `state`, at `factor` of its highest learning rates, when `done` of
        its budget is spent.

        Raises TrainingError if loss or gradients are not finite, or nothing has a gradient; the
        trained tensors are then as they were before.
        """
        chosen = self.choose(state, factor, done)
        with self.explained(state, chosen):
            return self.finish(state, chosen, self._gradients(state, chosen.rows))

    def choose(self, state: RunState, factor: float, done: float) -> Chosen:
        """Begins a step: the rows that come next, and the learning rate."""
        return Chosen(next(state.sampler), state.set_rates(factor), done)

    def penalise(self) -> None:
        """Adds the gradients of what the methods add to the loss of a step."""
        penalty = self.run.penalty()
        if penalty is not None:
            self.accelerator.backward(penalty)

    def finish(self, state: RunState, chosen: Chosen, loss: float) -> Taken:
        """Ends a step: clips the gradients that are there, and moves the tensors.

        Raises TrainingError if a gradient is not finite, or nothing has one.
        """
        norm = clip(state.optimiser, self.settings.max_norm)
        if not math.isfinite(norm):
            raise TrainingError(f"A gradient is not finite (norm {norm}, loss {loss:.6g})")
        self._check_reached(state)
        if state.policies.on_gradients(state.facts.steps, chosen.done):
            state.optimiser.state.clear()
        move(state.optimiser)
        state.policies.on_step(state.facts.steps, chosen.done)
        state.optimiser.zero_grad()
        state.facts.steps += 1
        state.facts.rows += len(chosen.rows)
        state.facts.losses.append(loss)
        return Taken(loss, norm, chosen.learning_rate)

    @contextmanager
    def explained(self, state: RunState, chosen: Chosen) -> Iterator[None]:
        """Within it a TrainingError drops the gradients, and says where it happened."""
        try:
            yield
        except TrainingError as error:
            state.optimiser.zero_grad()
            self._refuse(error, state, chosen)

    def _gradients(self, state: RunState, chosen: Sequence[int]) -> float:
        """Adds the gradients of the mean loss over the chosen rows; returns that loss.

        Each part counts by the items its own mean is over, so that accumulation gives what one
        large batch gives, whatever the lengths.
        """
        collated = [dict(self.collate(part)) for part in self._parts(self.visit(state, chosen))]
        items = [count_loss_items(batch) for batch in collated]
        if sum(items) == 0:
            raise TrainingError("No row of this batch has a label to learn from")
        total = 0.0
        for batch, count in zip(collated, items, strict=True):
            state.facts.tokens += count_tokens(batch)
            if count:
                total += self._backward(state, batch, count / sum(items))
        self.penalise()
        return total

    def visit(self, state: RunState, chosen: Sequence[int]) -> list[Any]:
        """The chosen rows, as this step finds them."""
        seed, step = self.settings.seed, state.facts.steps
        return [visited(self.rows[place], seed, step, place) for place in chosen]

    def _parts(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """The rows, forward pass by forward pass."""
        size, tokens = self.settings.per_device_batch_size, self.settings.tokens_per_pass
        if tokens is None:
            return [rows[start : start + size] for start in range(0, len(rows), size)]
        lengths = [row_length(row) for row in rows]
        packed, device = self.settings.packing, self.accelerator.device
        parts = cut(lengths, tokens, packed=packed, device=device)
        return [[rows[place] for place in part] for part in parts]

    def _backward(self, state: RunState, batch: dict[str, Tensor], share: float) -> float:
        """One forward and backward pass; returns its share of the loss."""
        device = self.accelerator.device
        forward = state.facts.forwards
        self.run.set_step(forward)
        seed_forward(self.settings.seed, forward, device)
        model = cast(nn.Module, self.run)
        with self.packed(), forward_context(model, self.settings.precision, device, batch):
            loss = self.run(**{name: held.to(device) for name, held in batch.items()}).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"The loss is not finite ({value})")
        if not loss.requires_grad:
            raise TrainingError("The loss does not depend on anything trainable")
        self.accelerator.backward(loss * share)
        state.facts.forwards += 1
        return value * share

    def _check_reached(self, state: RunState) -> None:
        groups = state.optimiser.param_groups
        if all(parameter.grad is None for group in groups for parameter in group["params"]):
            raise TrainingError("No trained parameter received a gradient")

    def _refuse(self, error: TrainingError, state: RunState, chosen: Chosen) -> NoReturn:
        """Says where it happened and what to try."""
        shown = ", ".join(str(row) for row in chosen.rows[:_SHOWN_ROWS])
        more = ", ..." if len(chosen.rows) > _SHOWN_ROWS else ""
        raise TrainingError(
            f"{error} at step {state.facts.steps + 1}, rows [{shown}{more}], learning rate "
            f"{chosen.learning_rate:.3g}, {self.settings.precision}. The tensors are those of the "
            "step before. Try a lower learning rate, a longer warm-up, a smaller max_norm or fp32, "
            "and look at these rows."
        ) from error
