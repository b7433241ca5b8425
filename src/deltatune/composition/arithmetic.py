"""Arithmetic that is more than a sum: means, TIES and DARE, on effective changes.

The order matters. DARE and TIES before SVD are what their papers do, on dense differences; SVD
first changes which entries are small. TIES of dropped changes is `ties([dare(a), dare(b)])`. A
scale after TIES is `0.4 * ties(...)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.composition.change import Change, add, check_alike, check_weights
from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import generator

__all__ = ["average", "dare", "ties"]


def average(changes: Sequence[Change], weights: Sequence[float] | None = None) -> Change:
    """Σ w_i Δ_i / Σ w_i, the mean effect, without the cross terms of averaged factors.

    Args:
        changes: of one model.
        weights: one for each, none of them negative; None for equal ones.

    Raises ConfigurationError for changes of different models, or weights that do not fit.
    """
    check_alike(changes)
    return add(changes, shares(weights, len(changes)))


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of a mean, which sum to 1. Raises ConfigurationError for weights of no mean."""
    found = check_weights(weights, count)
    if min(found) < 0 or not sum(found) > 0:
        raise ConfigurationError(
            f"A mean takes weights of at least 0, one of them above; found {found}. "
            "add() takes any."
        )
    return [weight / sum(found) for weight in found]


def ties(
    changes: Sequence[Change], *, density: float = 0.2, weights: Sequence[float] | None = None
) -> Change:
    """TIES: trims every change, elects a sign for every entry, and means what agrees with it.

    Yadav et al. 2023, arXiv:2306.01708. Of each change the share `density` of entries that are
    largest in magnitude is kept, counted over all of its parameters together as the authors do
    (PEFT counts in every tensor by itself); entries as large as the smallest that is kept are kept
    too. The sign is that of the sum over the changes, plus where the sum is zero.

    Args:
        changes: of one model. Give `-a` to take something away.
        density: the share of entries to keep, in (0, 1].
        weights: of the kept entries, after signs are elected; above 0. None for ones.

    Raises ConfigurationError for a density outside of (0, 1], weights that are not above 0, or
    changes of different models.
    """
    model = check_alike(changes)
    factors = check_weights(weights, len(changes))
    if not 0 < density <= 1:
        raise ConfigurationError(f"ties: density must lie in (0, 1]; it is {density}.")
    if min(factors) <= 0:
        raise ConfigurationError(
            f"ties: weights act after signs are elected, so they must be above 0; found {factors}. "
            "To take a change away, give -change."
        )
    least = [_threshold(change, density) for change in changes]
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for change in changes for name in change):
        held = [
            (value.where(value.abs() >= bound, 0), weight)
            for change, bound, weight in zip(changes, least, factors, strict=True)
            if name in change
            for value in [change[name]]
        ]
        found[name] = _agreeing(held)
    return Change(model, found)


def _threshold(change: Change, density: float) -> float:
    """The magnitude of the smallest entry that is kept."""
    if density == 1 or not change:
        return 0.0
    sizes = torch.cat([value.abs().flatten() for value in change.values()])
    dropped = sizes.numel() - max(1, int(density * sizes.numel()))
    return float(sizes.kthvalue(dropped + 1).values)


def _agreeing(held: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The mean of the weighted entries whose sign is that of the sum of the trimmed ones."""
    values = torch.stack([value for value, _ in held])
    sign = torch.where(values.sum(0) >= 0, 1.0, -1.0)
    agrees = values.sign() == sign
    weights = values.new_tensor([weight for _, weight in held])
    weighted = values * weights.view(-1, *[1] * (values.dim() - 1))
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(change: Change, *, rate: float = 0.9, seed: int = 0) -> Change:
    """DARE: entries dropped at random, the others scaled by 1 / (1 - rate); the same in the mean.

    Yu et al. 2024, arXiv:2311.03099. Which entries fall depends on the seed and the parameter's
    name alone: changes that are dropped to be summed need seeds of their own. The result is dense;
    it has no low rank.

    Args:
        change: the change.
        rate: the probability of an entry to be dropped, in [0, 1).
        seed: of the draw.

    Raises ConfigurationError for a rate outside of [0, 1).
    """
    if not 0 <= rate < 1:
        raise ConfigurationError(f"dare: rate must lie in [0, 1); it is {rate}.")
    found: dict[str, Tensor] = {}
    for name, value in change.items():
        drawn = torch.rand(value.shape, generator=generator("dare", seed, name))
        found[name] = value * (drawn >= rate).to(value.device, value.dtype) / (1 - rate)
    return Change(change.model, found)
