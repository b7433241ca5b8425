"""Optimisers and schedules, from settings.

A schedule is a pure function of the fraction of the budget that is spent, so it has no state to
keep and serves steps, epochs, seconds and tokens alike.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.training.budget import Budget
from deltatune.training.settings import Settings
from deltatune.training.trainable import Trainable

__all__ = [
    "build_optimiser",
    "clip",
    "move",
    "optimiser_names",
    "schedule_factor",
    "warmup_fraction",
]

# These need a closure, or gradients of a kind that no model here gives.
_UNFIT = {"lbfgs", "optimizer", "sparseadam"}
# Where the fused kernels of torch exist; elsewhere its default is taken.
_FUSED = {
    "adam": {"cpu", "cuda"},
    "adamw": {"cpu", "cuda"},
    "sgd": {"cpu", "cuda"},
    "adagrad": {"cpu"},
}

_DECAY: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
}


def optimiser_names() -> tuple[str, ...]:
    """The names that `Settings.optimiser` may have."""
    return tuple(sorted({*_of_torch(), "adafactor"}))


def build_optimiser(run: Trainable, settings: Settings) -> Optimizer:
    """Returns the optimiser of a run, over `run.parameter_groups`.

    Raises:
        UnknownNameError: there is no such optimiser, or it has no such argument.
        ConfigurationError: the learning rate is not set, nothing is trainable, or the optimiser
            refuses its arguments or the parameters.
    """
    if settings.learning_rate is None:
        raise ConfigurationError(
            "learning_rate is not set. Give one in the settings, or let the preset of the method "
            "be put there before `fit`."
        )
    kind = _kind(settings.optimiser)
    groups = run.parameter_groups(settings.learning_rate, settings.weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise ConfigurationError("There is nothing to train: the run has no trainable parameter.")
    options = _options(kind, settings)
    if {parameter.device.type for parameter in parameters} <= _FUSED.get(settings.optimiser, set()):
        options.setdefault("fused", True)
    try:
        return kind(groups, lr=settings.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The optimiser {settings.optimiser!r} refuses: {error}"
        ) from error


def schedule_factor(schedule: str, done: float, warmup: float) -> float:
    """Returns the learning rate as a fraction of the highest.

    Equal to transformers' schedules where the budget is counted in steps.

    Args:
        schedule: "constant", "linear" or "cosine".
        done: the fraction of the budget spent before this step, in [0, 1).
        warmup: the fraction of the budget that is warm-up, in [0, 1).
    """
    if done < warmup:
        return done / warmup
    return _DECAY[schedule]((done - warmup) / (1.0 - warmup))


def warmup_fraction(settings: Settings, budget: Budget, steps_per_epoch: int) -> float:
    """Returns the fraction of the budget that is warm-up; whole steps where steps are counted.

    Raises ConfigurationError if the warm-up does not leave anything of the budget, or is given in
    steps while the number of steps is not known.
    """
    total = budget.total_steps(steps_per_epoch)
    if total is None:
        if settings.warmup_steps:
            raise ConfigurationError(
                f"warmup_steps cannot be set against a budget of {budget}, because it is not "
                "known how many steps that makes. Use warmup_ratio."
            )
        return settings.warmup_ratio
    if not total:
        return 0.0
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
    if warmup >= total and warmup > 1:
        raise ConfigurationError(
            f"The warm-up of {warmup} steps leaves nothing of the budget of {total} steps. "
            "Shorten the warm-up or lengthen the budget."
        )
    return warmup / total if warmup < total else 0.0


@torch.no_grad()
def move(optimiser: Optimizer) -> None:
    """Moves the parameters; entries with a factor, by so many times what the optimiser moved them.

    An optimiser has one rate for a parameter, and a slot is one parameter. What it moves is in
    proportion to the rate, decoupled weight decay included.
    """
    apart = [
        (row[start:stop], row[start:stop].clone(), factor)
        for group in optimiser.param_groups
        for row in group["params"]
        for start, stop, factor in group.get("factors", ())
    ]
    optimiser.step()
    for part, before, factor in apart:
        part.copy_(torch.lerp(before, part, factor))


@torch.no_grad()
def clip(optimiser: Optimizer, max_norm: float | None) -> float:
    """Clips the gradients of each slot by itself, in place.

    Groups with the same `slot` are clipped together, a group without one by itself: runs that share
    a base never act on each other. A parameter without a gradient is left out.

    Returns:
        The largest norm over the slots before clipping; not finite if any gradient is not, and then
        nothing has been changed.
    """
    slots: dict[Any, list[Tensor]] = defaultdict(list)
    for place, group in enumerate(optimiser.param_groups):
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        slots[("slot", group["slot"]) if "slot" in group else place] += gradients
    held = [gradients for gradients in slots.values() if gradients]
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in held]
    largest = max((float(norm) for norm in norms), key=_nan_last, default=0.0)
    if max_norm is not None and math.isfinite(largest):
        for gradients, norm in zip(held, norms, strict=True):
            if float(norm) > max_norm:
                for gradient in gradients:
                    gradient.mul_(max_norm / norm)
    return largest


def _nan_last(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _of_torch() -> dict[str, type[Optimizer]]:
    found = inspect.getmembers(torch.optim, inspect.isclass)
    optimisers = {name.lower(): kind for name, kind in found if issubclass(kind, Optimizer)}
    return {name: kind for name, kind in optimisers.items() if name not in _UNFIT}


def _kind(name: str) -> Callable[..., Optimizer]:
    """The class by name; transformers is imported only for its own."""
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor
    kinds = _of_torch()
    if name not in kinds:
        raise UnknownNameError("optimiser", name, optimiser_names())
    return kinds[name]


def _options(kind: Callable[..., Optimizer], settings: Settings) -> dict[str, Any]:
    """The arguments of the optimiser beside parameters and learning rate, checked by name."""
    options: dict[str, Any] = dict(settings.optimiser_options)
    if settings.betas is not None:
        options["betas"] = settings.betas
    known = [*inspect.signature(kind).parameters][1:]
    if settings.weight_decay and "weight_decay" not in known:
        raise ConfigurationError(f"{settings.optimiser!r} has no weight decay. Set it to 0.")
    for name in options:
        if name not in known:
            raise UnknownNameError(f"argument of the optimiser {settings.optimiser!r}", name, known)
        if name in ("lr", "weight_decay"):
            raise ConfigurationError(f"{name} is a setting of its own, not an optimiser option.")
    if settings.optimiser == "adafactor":
        # With its own relative step the learning rate and the schedule would have no effect.
        options = {"scale_parameter": False, "relative_step": False, **options}
    return options
