"""LoRAHub: the weights of a sum of trained deltas, found from a few examples without gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltatune.composition.change import Change, Product, add, effective
from deltatune.composition.compress import Composed, as_delta, expression_of, write
from deltatune.composition.evolution import Points, minimise
from deltatune.composition.members import Source, members_of, model_of, resting
from deltatune.core.attaching import attach
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError

__all__ = ["Weighted", "lorahub"]


@dataclass(frozen=True)
class Weighted:
    """A sum whose weights were searched.

    Attributes:
        composed: the sum, as a delta.
        weights: one for each member.
        loss: the objective there, the penalty included.
        history: the best loss so far, at the start and after every generation.
    """

    composed: Composed
    weights: tuple[float, ...]
    loss: float
    history: tuple[float, ...]


def lorahub(
    deltas: Sequence[Source],
    objective: Callable[[Delta], float],
    *,
    evaluations: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    rank: int | None = None,
    methods: Collection[str] | None = None,
    seed: int = 0,
) -> Weighted:
    """Σ w_i Δ_i with the weights w in [-bound, bound] of least loss on a few examples.

    Huang et al. 2023, arXiv:2307.13269. The sum is one of effective changes, Σ w_i B_i A_i; the
    authors sum A and B apart, which adds cross terms, and search with nevergrad, here CMA-ES. Both
    begin at weights of zero, the backbone alone. Members may be of any method that folds, and of
    different ones.

    Args:
        deltas: at least two deltas, or (delta, slot), of one model.
        objective: the loss with the attached delta that it is called with, without gradients; the
            members are switched off meanwhile.
        evaluations: how often it may be called, the start included.
        bound: of every weight.
        penalty: times the mean of |w|, added to the loss.
        rank: of the result, see `as_delta`.
        methods: see `effective`.
        seed: of the search.

    Raises what `effective`, `as_delta` and `minimise` raise, and ConfigurationError for fewer than
    two members.
    """
    members = members_of(deltas)
    model = model_of(members)
    if len(members) < 2:
        raise ConfigurationError("lorahub weighs at least two deltas; one was given.")
    changes = [effective(delta, slot, methods=methods) for delta, slot in members]
    scratch = attach(model, expression_of(model, _ranks(add(changes))))

    def losses(points: Points) -> list[float]:
        found: list[float] = []
        for point in points:
            write(scratch, add(changes, point.tolist()))
            with resting(members), torch.no_grad():
                found.append(float(objective(scratch)) + penalty * float(np.abs(point).mean()))
        return found

    try:
        found = minimise(
            losses,
            np.zeros(len(members)),
            evaluations=evaluations,
            population=None,
            sigma=bound / 3,
            bound=bound,
            seed=seed,
        )
    finally:
        scratch.detach()
    weights = tuple(found.point.tolist())
    composed = as_delta(add(changes, weights), rank=rank)
    return Weighted(composed, weights, found.loss, found.history)


def _ranks(change: Change) -> dict[str, int | None]:
    """The ranks that any weighted sum fits into: those of its products side by side."""
    return {name: _rank(part) for name, part in change.parts.items()}


def _rank(part: Tensor | Product) -> int | None:
    if isinstance(part, Tensor):
        return None
    return min(part.rank, part.left.shape[0], part.right.shape[1])
