"""A run: a model and the delta that is trained on it, as one module.

The parameters of a delta are no parameters of the model. Whatever wants a module that holds what it
trains (a loop, DDP, a trainer) takes a `Run`, whose forward is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.delta import Delta
from deltatune.core.errors import StateError
from deltatune.core.in_place import InPlaceBank
from deltatune.core.policy import Policies, penalty, rate_factors
from deltatune.core.survey import Survey, surveys

__all__ = ["RoutedRun", "Run", "SlotRun"]


class Run(nn.Module):
    """A model with the delta that is trained.

    Args:
        delta: attached to its model.
        base_dropout: whether the frozen backbone's own dropout is on while training.
    """

    def __init__(self, delta: Delta, *, base_dropout: bool = False) -> None:
        super().__init__()
        self.model = delta.model
        self.delta = delta
        self.base_dropout = base_dropout
        self.checked = False

    def forward(self, **batch: Any) -> Any:
        """The model's output. Raises StateError if a site of the delta was not called by the first
        batch.
        """
        output = self.model(**batch)
        if not self.checked:
            dead = self.delta.dead_sites()
            if dead:
                raise StateError(
                    f"{len(dead)} sites of {self.delta.name} are never called by this model, "
                    f"{dead[0]} first: they would train nothing. Choose a target whose modules "
                    "take part in the forward pass."
                )
            self.checked = True
        return output

    def train(self, mode: bool = True) -> Run:
        """Training mode for the delta; for the backbone only if its dropout is wanted.

        Evaluation ends what `set_step` said: whoever trains next counts anew.
        """
        self.training = mode
        if not mode:
            self.delta.keyed = False
            self.delta.steps.clear()
        self.delta.train(mode)
        self.model.train(mode and self.base_dropout)
        return self

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups, one for each slot and one for what they share, where not frozen."""
        if not self.delta.attached:
            raise StateError(f"{self.delta.name} is not attached: there is nothing to train.")
        bank = self.delta.bank
        common = {"lr": learning_rate, "weight_decay": weight_decay}
        if isinstance(bank, InPlaceBank):
            trained = [row for row in bank.slots if row.requires_grad]
            return [{"params": trained, **common}] if trained else []
        rows = [(row, bank.own) for row in self._rows(bank)]
        rows += [] if bank.shared is None else [(bank.shared, bank.common)]
        groups = [(row, rate_factors(self.delta, flat)) for row, flat in rows if row.requires_grad]
        return [
            {"params": [row], **common, **({"factors": factors} if factors else {})}
            for row, factors in groups
        ]

    def _rows(self, bank: Bank) -> Sequence[nn.Parameter]:
        """The rows of its slots."""
        return list(bank.slots)

    def trained_slots(self) -> list[int]:
        """The slots that are not frozen."""
        if isinstance(self.delta.bank, InPlaceBank):
            return []
        return [k for k in range(self.delta.slots) if not self.delta.is_frozen(k)]

    def penalty(self) -> Tensor | None:
        """What the methods add to the loss of a step; None where they add nothing."""
        return penalty(self.delta, self.trained_slots())

    def policies(self) -> Policies:
        """What the methods do on the events of a step, at its beginning."""
        return Policies(self.delta, self.trained_slots())

    def surveys(self) -> list[Survey]:
        """What the methods must see before the first step, where they stand as they were drawn."""
        return surveys(self.delta, self.trained_slots())

    def trainable_state(self) -> dict[str, Tensor]:
        """Every leaf of every slot, for a checkpoint."""
        return {
            f"{slot}/{name}": value.detach().clone()
            for slot in range(self.delta.slots)
            for name, value in self.delta.bank.read(slot).items()
        }

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave."""
        for slot in range(self.delta.slots):
            mine = f"{slot}/"
            values = {
                name.removeprefix(mine): v for name, v in state.items() if name.startswith(mine)
            }
            self.delta.bank.write(slot, values)

    def set_step(self, step: int) -> None:
        """Says which step comes next: dropout is keyed by it."""
        self.delta.keyed = True
        self.delta.step = step


class SlotRun(Run):
    """One slot of a delta as a run of its own, beside the others on the same model.

    Its forward sends every row through its slot. Its state names no slot, so that it goes on in
    any.

    Args:
        delta: attached to its model.
        slot: which of its slots.
    """

    def __init__(self, delta: Delta, slot: int) -> None:
        super().__init__(delta)
        delta.check_slot(slot)
        self.slot = slot

    def forward(self, **batch: Any) -> Any:
        """See Run."""
        with self.delta.route([self.slot]):
            return super().forward(**batch)

    def _rows(self, bank: Bank) -> Sequence[nn.Parameter]:
        return [bank.slots[self.slot]]

    def trained_slots(self) -> list[int]:
        """Its slot, unless it is frozen."""
        return [self.slot] if self.slot in super().trained_slots() else []

    def trainable_state(self) -> dict[str, Tensor]:
        """Every leaf of its slot, for a checkpoint."""
        held = self.delta.bank.read(self.slot)
        return {name: value.detach().clone() for name, value in held.items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave."""
        self.delta.bank.write(self.slot, state)

    def set_step(self, step: int) -> None:
        """Says which step of its own comes next."""
        self.delta.keyed = True
        self.delta.steps[self.slot] = step


class RoutedRun(Run):
    """All slots of a delta as one run: a batch says in `slots` [rows] through which of them each of
    its rows goes.
    """

    def forward(self, **batch: Any) -> Any:
        """See Run."""
        with self.delta.route(batch.pop("slots").tolist()):
            return super().forward(**batch)
