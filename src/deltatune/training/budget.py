"""How long a run trains: budgets as types, so that 300 can never be mistaken for epochs.

A budget says which fraction of it is spent; the schedule and the end of the run follow from that
fraction alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

from deltatune.core.errors import ConfigurationError, UnknownNameError

__all__ = [
    "Budget",
    "Epochs",
    "Nothing",
    "Seconds",
    "Spent",
    "Steps",
    "Tokens",
    "parse",
    "parse_stages",
]


@dataclass(frozen=True)
class Spent:
    """What a run has used so far.

    Attributes:
        steps: optimiser steps.
        seconds: of training, without evaluation and checkpoints.
        tokens: input tokens, without padding.
    """

    steps: int
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Steps:
    """A number of optimiser steps."""

    count: int

    def __post_init__(self) -> None:
        _positive("steps", self.count, whole=True)

    def __str__(self) -> str:
        return f"{self.count} steps"

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """The number of optimiser steps, where it is known beforehand."""
        return self.count

    def fraction(self, spent: Spent, steps_per_epoch: int) -> float:
        """The part of the budget that is spent; from 1 on the run is at its end."""
        return spent.steps / self.count


@dataclass(frozen=True)
class Epochs:
    """A number of passes over the rows; a run ends after the step that reaches it."""

    count: float

    def __post_init__(self) -> None:
        _positive("epochs", self.count)

    def __str__(self) -> str:
        return f"{self.count:.17g} epochs"

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """The number of optimiser steps, where it is known beforehand."""
        return math.ceil(self.count * steps_per_epoch)

    def fraction(self, spent: Spent, steps_per_epoch: int) -> float:
        """The part of the budget that is spent; from 1 on the run is at its end."""
        return spent.steps / math.ceil(self.count * steps_per_epoch)


@dataclass(frozen=True)
class Seconds:
    """A time of training, without evaluation and checkpoints. Not repeatable to the bit."""

    count: float

    def __post_init__(self) -> None:
        _positive("seconds", self.count)

    def __str__(self) -> str:
        return f"{self.count:.17g} seconds"

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """The number of optimiser steps, where it is known beforehand."""
        return None

    def fraction(self, spent: Spent, steps_per_epoch: int) -> float:
        """The part of the budget that is spent; from 1 on the run is at its end."""
        return spent.seconds / self.count


@dataclass(frozen=True)
class Tokens:
    """A number of input tokens, without padding."""

    count: int

    def __post_init__(self) -> None:
        _positive("tokens", self.count, whole=True)

    def __str__(self) -> str:
        return f"{self.count} tokens"

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """The number of optimiser steps, where it is known beforehand."""
        return None

    def fraction(self, spent: Spent, steps_per_epoch: int) -> float:
        """The part of the budget that is spent; from 1 on the run is at its end."""
        return spent.tokens / self.count


@dataclass(frozen=True)
class Nothing:
    """No training: what a delta, or a backbone, begins as is scored."""

    def __str__(self) -> str:
        return "nothing"

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """None are taken."""
        return 0

    def fraction(self, spent: Spent, steps_per_epoch: int) -> float:
        """The run is at its end before it begins."""
        return 1.0


_Counted: TypeAlias = Steps | Epochs | Seconds | Tokens
Budget: TypeAlias = _Counted | Nothing

_UNITS: dict[str, tuple[type[_Counted], int]] = {
    "step": (Steps, 1),
    "epoch": (Epochs, 1),
    "second": (Seconds, 1),
    "minute": (Seconds, 60),
    "hour": (Seconds, 3600),
    "token": (Tokens, 1),
}


def parse(text: str) -> Budget:
    """Reads a budget, e.g. "300 steps", "2.5 epochs", "10 minutes", "1e6 tokens", "nothing".

    `parse(str(budget)) == budget`. Raises ConfigurationError, UnknownNameError for an unknown unit.
    """
    if text.strip().casefold() == "nothing":
        return Nothing()
    found = re.fullmatch(r"\s*([0-9][0-9_.]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if found is None:
        raise ConfigurationError(
            f'A budget is a number and a unit, e.g. "300 steps" or "10 minutes". Found {text!r}.'
        )
    unit = found[2].casefold()
    if unit.removesuffix("s") not in _UNITS:
        raise UnknownNameError("unit of a budget", found[2], [f"{name}s" for name in _UNITS])
    kind, factor = _UNITS[unit.removesuffix("s")]
    try:
        number = float(found[1]) * factor
    except ValueError:
        raise ConfigurationError(f"{found[1]!r} is not a number. Found in {text!r}.") from None
    return kind(int(number) if number.is_integer() else number)  # type: ignore[arg-type]


def parse_stages(text: str) -> tuple[Budget, ...]:
    """Reads one budget, or one for each stage: "200 steps >> 2 epochs". Raises as `parse`."""
    return tuple(parse(one) for one in text.split(">>"))


def _positive(unit: str, number: float, *, whole: bool = False) -> None:
    """Refuses a number that no budget can have."""
    if not 0 < number < math.inf or (whole and number != int(number)):
        kind = "a positive whole number" if whole else "a positive number"
        raise ConfigurationError(f"A budget in {unit} is {kind}. Found {number!r}.")
