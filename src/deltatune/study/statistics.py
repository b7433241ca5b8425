"""How sure a comparison is: intervals over tasks, paired tests, ranks.

Tasks are what is drawn here: a method is better if it is better on tasks, and seeds tell only how
well each score is known. So every score below is the mean over the seeds of one task.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from deltatune.core.errors import ConfigurationError
from deltatune.study.libraries import library

__all__ = ["Pair", "critical_distance", "interval", "mean_ranks", "pairs"]

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Pair:
    """Two arms on the same tasks.

    Attributes:
        first, second: their names.
        difference: mean of first minus second over the tasks.
        low, high: its 95 % interval, by bootstrap over tasks.
        wins, losses: tasks on which first is higher, and lower.
        p: of Wilcoxon's signed-rank test, two-sided, after Holm's correction for all pairs.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean, by the percentiles of a bootstrap over the values.

    Equal values, or a single one, give that value twice: nothing is known of their spread. Raises
    ConfigurationError where there is none.
    """
    if not values:
        raise ConfigurationError("There are no values to draw from.")
    if len(set(values)) == 1:
        return values[0], values[0]
    found = library("scipy.stats").bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=draws,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def pairs(scores: Scores) -> list[Pair]:
    """Compares every two arms that have the same tasks, in order.

    Args:
        scores: arm -> its score on each task, the tasks in one order.

    Raises:
        ConfigurationError: the arms have different numbers of tasks.
    """
    _check(scores)
    found = [_pair(one, other, scores) for one, other in itertools.combinations(scores, 2)]
    order = sorted(range(len(found)), key=lambda k: found[k].p)
    corrected, highest = dict[int, float](), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(found) - rank) * found[k].p))
        corrected[k] = highest
    return [replace(pair, p=corrected[k]) for k, pair in enumerate(found)]


def mean_ranks(scores: Scores) -> dict[str, float]:
    """Returns arm -> its mean rank over the tasks, 1 the highest score; equals share ranks."""
    _check(scores)
    stats = library("scipy.stats")
    by_task = zip(*scores.values(), strict=True)
    ranks = [stats.rankdata([-score for score in task]) for task in by_task]
    return {name: fmean(float(rank[k]) for rank in ranks) for k, name in enumerate(scores)}


def critical_distance(arms: int, tasks: int) -> float:
    """Returns by how much two mean ranks must differ to be told apart at 5 % (Nemenyi's test, in
    Demsar 2006): q sqrt(k (k + 1) / 6 n).
    """
    if arms < 2 or tasks < 1:
        raise ConfigurationError(
            f"Ranks are compared of at least 2 arms on at least 1 task; found {arms} and {tasks}."
        )
    stats = library("scipy.stats")
    quantile = float(stats.studentized_range.ppf(0.95, arms, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(arms * (arms + 1) / (6 * tasks))


def _pair(first: str, second: str, scores: Scores) -> Pair:
    differences = [a - b for a, b in zip(scores[first], scores[second], strict=True)]
    low, high = interval(differences)
    p = 1.0
    if any(differences):
        p = float(library("scipy.stats").wilcoxon(differences, zero_method="zsplit").pvalue)
    return Pair(
        first=first,
        second=second,
        difference=fmean(differences),
        low=low,
        high=high,
        wins=sum(d > 0 for d in differences),
        losses=sum(d < 0 for d in differences),
        p=p,
    )


def _check(scores: Scores) -> None:
    if len({len(values) for values in scores.values()}) != 1 or not all(scores.values()):
        raise ConfigurationError(
            "Every arm needs a score on every task; found "
            + ", ".join(f"{name}: {len(values)}" for name, values in scores.items())
            + "."
        )
