"""A case: a method on a miniature family, and what the laws measure on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import UnsupportedError
from deltatune.core.grammar import Expression, parse
from deltatune.testing.families import FAMILIES, Family

__all__ = [
    "Case",
    "Law",
    "cast",
    "close",
    "close_gradients",
    "marks",
    "move",
    "named_gradients",
    "same_state",
]

Law = Callable[["Case", Path], None]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Case:
    """A method on a family.

    Attributes:
        method: an expression in the grammar of methods.
        family: a name in `deltatune.testing.families`.
    """

    method: str
    family: str

    @property
    def expression(self) -> Expression:
        """The expression, read."""
        return parse(self.method)

    @property
    def kin(self) -> Family:
        """The family, looked up."""
        return FAMILIES[self.family]

    @property
    def in_place(self) -> bool:
        """Whether it is a control that trains the backbone itself."""
        return self.expression.in_place

    @property
    def lacks(self) -> bool:
        """Whether the family cannot take a face of the expression."""
        return any(method.face in self.kin.lacks for method in self.expression)

    def refusal(self) -> str:
        """The sentence with which the family refuses the expression; the model is left alone."""
        model = self.model()
        before = marks(model)
        try:
            api.attach(model, self.expression)
        except UnsupportedError as error:
            assert marks(model) == before
            return str(error)
        raise AssertionError(f"{self.family} is said to lack a face of {self.method} and took it")

    def model(self) -> PreTrainedModel:
        """A frozen model: some attention kernels differ for a base that takes gradients."""
        return self.kin.build().requires_grad_(False)

    @contextmanager
    def attached(
        self, *, moved: bool = True, slots: int = 1
    ) -> Iterator[tuple[PreTrainedModel, Delta]]:
        """A model with the delta, its leaves moved off their initial values."""
        model = self.model()
        delta = api.attach(model, self.expression, slots=slots)
        if moved:
            move(delta)
        yield model, delta

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits of the family's batch."""
        return self.kin.logits(model, self.kin.batch())

    @torch.no_grad()
    def generate(self, model: Any, **kwargs: Any) -> Tensor:
        """Token ids of four generated tokens, greedy unless the arguments say otherwise."""
        fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        made: Tensor = model.generate(**{**fixed, **kwargs})
        return made


@torch.no_grad()
def move(delta: Delta, seed: int = 0) -> None:
    """Adds small noise to every trained entry."""
    random = torch.Generator().manual_seed(seed)
    for row in delta.bank.parameters():
        row.add_(0.05 * torch.randn(row.shape, generator=random).to(row.dtype))


def cast(model: Model, dtype: torch.dtype) -> Model:
    """The model itself, in another dtype."""
    return model.to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Asserts that two results of one computation, differently ordered, agree."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def close_gradients(actual: Tensor, expected: Tensor) -> None:
    """Asserts that two gradients agree, small entries within the scale of the largest."""
    scale = float(expected.abs().max()) + 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * scale)


def named_gradients(delta: Delta, slot: int) -> dict[str, Tensor]:
    """The gradient of every trained leaf of one slot, by full name."""
    row = delta.bank.slots[slot]
    assert row.grad is not None
    held, row.data = row.data.clone(), row.grad
    try:
        return {name: value.detach().clone() for name, value in delta.bank.read(slot).items()}
    finally:
        row.data = held


def same_state(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Asserts that a state dict is the wanted one: names, order, bits."""
    state = model.state_dict()
    assert list(state) == list(wanted)
    for name, value in state.items():
        assert torch.equal(value, wanted[name]), name


def marks(model: nn.Module) -> list[object]:
    """All that a delta could leave behind on a model, bytes apart."""
    return [
        [
            (
                name,
                type(module),
                module.training,
                sorted(k for k in module.__dict__ if not k.startswith("_is_hf")),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                [p is not None and p.requires_grad for p in module._parameters.values()],
            )
            for name, module in model.named_modules()
        ],
        getattr(getattr(model, "config", None), "_attn_implementation", None),
    ]
