"""Search without gradients: CMA-ES of the library `cma`, on a generation of points at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltatune.composition.libraries import library
from deltatune.core.errors import ConfigurationError, TrainingError

__all__ = ["Found", "minimise"]

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """The best point of a search.

    Attributes:
        point: [dimension].
        loss: there.
        history: the best loss so far, at the start and after every generation.
        evaluations: how many points were evaluated.
    """

    point: Points
    loss: float
    history: tuple[float, ...]
    evaluations: int


def minimise(
    losses: Callable[[Points], Sequence[float]],
    start: Points,
    *,
    evaluations: int,
    population: int | None,
    sigma: float,
    bound: float,
    seed: int,
) -> Found:
    """The point of least loss that CMA-ES meets; the start is the first that it evaluates.

    Hansen and Ostermeier 2001. A point whose loss is not finite counts as the worst of its
    generation. Numbers come from a generator of its own: numpy's global one is not touched.

    Args:
        losses: one loss for each of [points, dimension].
        start: [dimension], at least 2; the centre of the first generation.
        evaluations: how many points to evaluate at most, the start included.
        population: points of a generation; None for 4 + 3 ln(dimension).
        sigma: the standard deviation of the first generation.
        bound: no entry leaves [-bound, bound].
        seed: of the draws.

    Raises:
        ConfigurationError: fewer evaluations than the start and one generation need, a population
            or a dimension below 2, or a sigma or bound that is not above 0.
        TrainingError: no loss of a generation is finite.
        UnsupportedError: `cma` is not installed.
    """
    cma = library("cma")
    size = population or 4 + int(3 * math.log(max(2, len(start))))
    if evaluations < 1 + size or size < 2 or len(start) < 2 or not (sigma > 0 and bound > 0):
        raise ConfigurationError(
            "A search needs 2 dimensions, 2 points in a generation, evaluations for the start and "
            f"one generation, and sigma and bound above 0; found {len(start)} dimensions, {size} "
            f"points, {evaluations} evaluations, sigma={sigma}, bound={bound}."
        )
    random = np.random.default_rng(seed)
    options = {
        "bounds": [-bound, bound],
        "popsize": size,
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": math.nan,
        "verbose": -9,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises on options that are chosen here
        strategy = cma.CMAEvolutionStrategy(start, sigma, options)
    best, least = start, _checked(losses(start[None]), 1)[0]
    history, spent = [least], 1
    while spent + size <= evaluations:
        points = np.stack(strategy.ask())
        found = _checked(losses(points), size)
        strategy.tell(list(points), found)
        place = int(np.argmin(found))
        if found[place] < least:
            best, least = points[place], found[place]
        history.append(least)
        spent += size
    return Found(best, least, tuple(history), spent)


def _checked(losses: Sequence[float], count: int) -> list[float]:
    values = [float(loss) for loss in losses]
    finite = [value for value in values if math.isfinite(value)]
    if len(values) != count:
        raise ConfigurationError(f"{count} points need as many losses; found {len(values)}.")
    if not finite:
        raise TrainingError(
            "No loss of a generation is finite. Look at the objective, or search nearer to the "
            "start (a smaller sigma or scale)."
        )
    return [value if math.isfinite(value) else max(finite) for value in values]
