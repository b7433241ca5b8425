"""The learning rate of an arm, chosen from a grid, on validation rows unless it is said otherwise.

Every arm, full tuning included, gets a grid of equal size. The test rows have no say, but where a
study repeats one in which they had. A best
value at the edge of its grid says only that the search stopped too early: it is reported, and the
grid can be extended beyond it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from deltatune.core.errors import ConfigurationError
from deltatune.study.cell import Cell, CellResult, Strict

__all__ = ["Choice", "Grid", "Split", "beyond", "choose"]

Split: TypeAlias = Literal["validation", "test"]


class Grid(Strict):
    """The learning rates that every arm tries.

    Attributes:
        values: at least one, rising; rates, or factors of the arm's preset if `relative`.
        relative: whether the values are factors. Arms of different kinds want rates that lie orders
            of magnitude apart: factors give each the same number of values around its own preset.
    """

    values: tuple[float, ...] = (1.0,)
    relative: bool = True

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Reads "1e-4,3e-4,1e-3" (rates) or "x0.3,x1,x3" (factors of each arm's preset).

        Raises ConfigurationError.
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        relative = {word.startswith("x") for word in words}
        try:
            values = sorted({float(word.removeprefix("x")) for word in words})
        except ValueError:
            values = []
        if len(relative) != 1 or not values or not all(0 < v < math.inf for v in values):
            raise ConfigurationError(
                "Learning rates are positive numbers with commas between them, '1e-4,3e-4,1e-3', or"
                f" factors of each arm's preset, 'x0.3,x1,x3'. Found {text!r}."
            )
        return cls(values=tuple(values), relative=relative.pop())

    def __str__(self) -> str:
        return ",".join(f"{'x' if self.relative else ''}{value:g}" for value in self.values)

    @property
    def tried(self) -> int:
        """How many values each arm tries on validation; 0 where there is nothing to choose."""
        return len(self.values) if len(self.values) > 1 else 0

    def rates(self, preset: float) -> tuple[float, ...]:
        """Returns the learning rates for an arm with this preset, rising."""
        factor = preset if self.relative else 1.0
        return tuple(float(f"{value * factor:.6g}") for value in self.values)


def beyond(rates: Iterable[float], edge: float) -> float:
    """Returns the rate that extends a grid beyond one of its edges, at the ratio found there."""
    ordered = sorted(rates)
    neighbour = ordered[1] if edge == ordered[0] else ordered[-2]
    return float(f"{edge * edge / neighbour:.6g}")


@dataclass(frozen=True)
class Choice:
    """What was chosen for one arm on one or more tasks.

    Attributes:
        rate: the learning rate; None if no value was run to its end on all tasks.
        means: learning rate -> mean score over the tasks, a fraction; -infinity for a
            value of which a run failed, as a loss that is not finite does.
        at_edge: whether the best of at least two values is the lowest or the highest tried.
    """

    rate: float | None
    means: Mapping[float, float]
    at_edge: bool


def choose(tried: Iterable[tuple[Cell, CellResult | None]], on: Split = "validation") -> Choice:
    """Returns the rate of the highest mean score, the lower one of equals.

    Args:
        tried: the cells of one arm with their results, None for a cell that failed. Every rate must
            have been tried on the same tasks and seeds; one that was not counts as failed.
        on: the rows whose score counts.
    """
    scores: dict[float, dict[tuple[str, int], float]] = defaultdict(dict)
    for cell, result in tried:
        if cell.learning_rate is not None and result is not None:
            validated = result.validation.get(result.metric, math.nan)
            value = validated if on == "validation" else result.score
            scores[cell.learning_rate][cell.task, cell.seed] = value
        elif cell.learning_rate is not None:
            scores[cell.learning_rate][cell.task, cell.seed] = math.nan
    places = set().union(*scores.values())
    means = {rate: _mean(found, places) for rate, found in sorted(scores.items())}
    best = max(means, key=lambda rate: (means[rate], -rate), default=None)
    if best is None or means[best] == -math.inf:
        return Choice(None, means, at_edge=False)
    return Choice(best, means, at_edge=len(means) > 1 and best in (min(means), max(means)))


def _mean(found: Mapping[tuple[str, int], float], places: set[tuple[str, int]]) -> float:
    """Returns the mean, or -infinity if a score is missing or not a number."""
    complete = set(found) == places and not any(map(math.isnan, found.values()))
    return math.fsum(found.values()) / len(places) if complete else -math.inf
