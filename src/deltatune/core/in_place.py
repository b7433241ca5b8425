"""The one bank whose rows are the backbone's own tensors: for the `full` control, and for nothing
else.

A snapshot of the backbone is kept beside it, so that detaching leaves every byte as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltatune.core.errors import StateError
from deltatune.core.fingerprint import digest
from deltatune.core.leaf import Leaf, zeros

__all__ = ["InPlaceBank", "in_place_leaves"]


def in_place_leaves(model: nn.Module, key: str) -> dict[str, Leaf]:
    """One leaf for each distinct parameter of the model."""
    return {
        f"{key}/{name}": zeros(*parameter.shape) for name, parameter in model.named_parameters()
    }


class InPlaceBank(nn.Module):
    """Every parameter of a model, trainable, with a copy of what it was.

    Args:
        model: the model that is trained.
        key: the prefix of the leaves' names.
    """

    count = 1

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.__dict__["model"] = model  # no child of its own
        self.names = [f"{key}/{name}" for name, _ in model.named_parameters()]
        self.slots = nn.ParameterList(parameter for _, parameter in model.named_parameters())
        self.before = [parameter.detach().clone() for parameter in self.slots]

    @property
    def numel(self) -> int:
        """Entries of all distinct parameters."""
        return sum(parameter.numel() for parameter in self.slots)

    @property
    def total(self) -> int:
        """The same: there is one slot."""
        return self.numel

    def draw(self, slot: int, leaves: Mapping[str, Leaf], seed: int, *, shared: bool) -> None:
        """Begins training at the backbone's own values."""
        del slot, leaves, seed, shared
        for parameter in self.slots:
            parameter.requires_grad_(True)

    def read(self, slot: int) -> dict[str, Tensor]:
        """The parameters by name."""
        del slot
        return dict(zip(self.names, self.slots, strict=True))

    def gradients(self, slot: int) -> dict[str, Tensor]:
        """The gradients by name, where there are any."""
        held = self.read(slot).items()
        return {name: value.grad for name, value in held if value.grad is not None}

    def digest(self, slot: int) -> str:
        """A digest of all parameters."""
        return digest(self.read(slot))

    @torch.no_grad()
    def write(self, slot: int, values: Mapping[str, Tensor]) -> None:
        """Sets every parameter."""
        del slot
        for name, parameter in zip(self.names, self.slots, strict=True):
            parameter.copy_(values[name])

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was there before."""
        for parameter, before in zip(self.slots, self.before, strict=True):
            parameter.copy_(before)
            parameter.grad = None

    def open(self) -> None:
        """Nothing to join. Raises StateError if the model has other parameters by now."""
        model: nn.Module = self.__dict__["model"]
        if next(model.parameters()) is not self.slots[0]:
            raise StateError(
                "The backbone's parameters were replaced after `full` was attached (by sharding, "
                "say), which would train the old ones. Attach it afterwards."
            )

    def close(self) -> None:
        """Nothing was opened."""
