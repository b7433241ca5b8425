"""The experiments of the paper, one file each.

A new one is a file beside the others and a line here.
"""

from __future__ import annotations

from deltatune.core.errors import UnknownNameError
from deltatune.study.experiment import Experiment
from deltatune.study.experiments import (
    combination,
    convergence,
    efficiency,
    forgetting,
    gap,
    grid,
    performance,
    review,
    scale,
    sequence,
    size,
    transfer,
    zero_shot,
)

__all__ = ["EXPERIMENTS", "find_experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        performance,
        convergence,
        efficiency,
        combination,
        sequence,
        gap,
        scale,
        transfer,
        zero_shot,
        size,
        review,
        forgetting,
        grid,
    )
}


def find_experiment(name: str) -> Experiment:
    """Returns the experiment of that name. Raises UnknownNameError."""
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
