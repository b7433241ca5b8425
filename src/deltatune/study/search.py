"""Learning rates proposed by Optuna between two bounds, from what was tried before.

The first values are spread evenly, on a logarithmic scale; each later one is proposed by a
tree-structured Parzen estimator from the mean validation scores of all before it. The proposals
follow from those scores alone, so that a search that goes on, or that several processes share, is
the same search.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Self, TypeAlias

from pydantic import Field, model_validator

from deltatune.core.errors import ConfigurationError
from deltatune.study.cell import Strict
from deltatune.study.libraries import library
from deltatune.study.select import Grid

__all__ = ["Rates", "Search", "parse_rates"]

SPREAD = 3  # values before the first proposal
_FORM = re.compile(r"(\d+)\s+of\s+(x?)([0-9.eE+-]+)\s*\.\.\s*(x?)([0-9.eE+-]+)")


class Search(Strict):
    """How many learning rates an arm tries, and between which bounds.

    Attributes:
        trials: values for each arm.
        low: the lowest; a rate, or a factor of the arm's preset if `relative`.
        high: the highest.
        relative: see `Grid`.
    """

    trials: Annotated[int, Field(ge=SPREAD)]
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]
    relative: bool = True

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ConfigurationError(
                f"A search goes from a lower to a higher rate; found {self.low:g}..{self.high:g}."
            )
        return self

    def __str__(self) -> str:
        x = "x" if self.relative else ""
        return f"{self.trials} of {x}{self.low:g}..{x}{self.high:g}"

    @property
    def tried(self) -> int:
        """How many values each arm tries on validation."""
        return self.trials

    def rates(self, preset: float) -> tuple[float, ...]:
        """Those that are known beforehand: none."""
        return ()

    def propose(self, preset: float, scores: Mapping[float, float]) -> float:
        """Returns the next rate to try.

        Args:
            preset: of the arm.
            scores: rate -> mean validation score of what was tried, -infinity where it failed; in
                the order of the trials.

        Raises UnsupportedError without Optuna.
        """
        factor = preset if self.relative else 1.0
        low, high = self.low * factor, self.high * factor
        if len(scores) < SPREAD:
            place = (len(scores) + 0.5) / SPREAD
            return float(f"{low * (high / low) ** place:.6g}")
        optuna = library("optuna", extra="search")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # As many proposals as trials: each has a seed of its own, or they would all be one.
        sampler = optuna.samplers.TPESampler(n_startup_trials=SPREAD, seed=len(scores))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        bounds = {"rate": optuna.distributions.FloatDistribution(low, high, log=True)}
        worst = min((s for s in scores.values() if s > -float("inf")), default=0.0)
        for rate, score in scores.items():
            within = min(max(rate, low), high)  # it was rounded
            study.add_trial(
                optuna.trial.create_trial(
                    params={"rate": within}, distributions=bounds, value=max(score, worst - 1.0)
                )
            )
        return float(f"{study.ask(bounds).params['rate']:.6g}")


Rates: TypeAlias = Grid | Search


def parse_rates(text: str) -> Rates:
    """Reads "1e-4,3e-4,1e-3" or "x0.3,x1,x3" as a grid, "12 of x0.1..x10" as a search.

    Raises ConfigurationError.
    """
    if " of " not in text:
        return Grid.parse(text)
    found = _FORM.fullmatch(text.strip())
    if found is None or found[2] != found[4]:
        raise ConfigurationError(
            "A search is a number of trials and two rates, '12 of 1e-4..1e-2', or two factors of "
            f"each arm's preset, '12 of x0.1..x10'. Found {text!r}."
        )
    try:
        low, high = float(found[3]), float(found[5])
    except ValueError:
        raise ConfigurationError(f"{text!r} holds what is no number.") from None
    return Search(trials=int(found[1]), low=low, high=high, relative=bool(found[2]))
