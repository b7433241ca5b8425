"""Black-box tuning: a soft prompt found by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from deltatune.composition.evolution import Points, minimise
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError
from deltatune.core.in_place import InPlaceBank
from deltatune.core.leaf import generator

__all__ = ["Prompted", "blackbox", "in_slots", "prompt_of", "write_prompt"]

Objective: TypeAlias = Callable[[Tensor], "Sequence[float] | Tensor"]


@dataclass(frozen=True)
class Prompted:
    """A prompt that was searched.

    Attributes:
        prompt: [length, width].
        point: z, [dimension].
        loss: there.
        history: the best loss so far, at the start and after every generation.
        evaluations: how many prompts were evaluated.
    """

    prompt: Tensor
    point: Tensor
    loss: float
    history: tuple[float, ...]
    evaluations: int


def blackbox(
    objective: Objective,
    start: Tensor,
    *,
    dimension: int = 500,
    evaluations: int = 8001,
    population: int = 20,
    scale: float = 1.0,
    sigma: float = 1.0,
    bound: float = 5.0,
    seed: int = 0,
) -> Prompted:
    """P = P0 + A z with z in R^d of least loss, found by CMA-ES; no gradient is asked for.

    Sun et al. 2022, arXiv:2201.03514. A [length width, d] is random, drawn from the seed, and stays
    fixed. Its entries are normal with standard deviation `scale` std(P0) / √d, as in the authors'
    second version (arXiv:2205.11200), so that a z of unit variance moves the prompt by as much as
    its own spread, whatever d is.

    Args:
        objective: prompts [points, length, width] to one loss each. It may ask a model behind an
            interface, or `in_slots` of a delta.
        start: P0, [length, width]: embeddings of words, or a prompt that was trained before. It is
            evaluated first.
        dimension: d, at least 2.
        evaluations: how many prompts to evaluate at most, the start included.
        population: prompts of a generation.
        scale: of the projection.
        sigma: the standard deviation of the first generation of z.
        bound: of every entry of z.
        seed: of the projection and of the search.

    Raises ConfigurationError for a start that is no matrix or has no spread, and what `minimise`
    raises.
    """
    spread = float(start.double().std()) if start.dim() == 2 and start.numel() > 1 else 0.0
    if not spread > 0 or not scale > 0:
        raise ConfigurationError(
            "blackbox: start must be [length, width] with entries that differ, and scale above 0; "
            f"found {tuple(start.shape)} with a standard deviation of {spread}, scale={scale}."
        )
    origin = start.detach().to("cpu", torch.float32)
    drawn = torch.randn(origin.numel(), dimension, generator=generator("blackbox", seed))
    projection = drawn * (scale * spread / dimension**0.5)

    def prompts(points: Points) -> Tensor:
        moves: Tensor = torch.from_numpy(points).float() @ projection.mT
        return origin + moves.view(-1, *origin.shape)

    def losses(points: Points) -> Sequence[float]:
        found = objective(prompts(points))
        return found.tolist() if isinstance(found, Tensor) else found

    found = minimise(
        losses,
        np.zeros(dimension),
        evaluations=evaluations,
        population=population,
        sigma=sigma,
        bound=bound,
        seed=seed,
    )
    point = torch.from_numpy(found.point).float()
    return Prompted(
        prompts(found.point[None])[0], point, found.loss, found.history, found.evaluations
    )


def in_slots(
    delta: Delta, batch: Mapping[str, Tensor], losses: Callable[[Mapping[str, Tensor]], Tensor]
) -> Objective:
    """An objective that evaluates a generation in one forward pass, a prompt in every slot.

    Args:
        delta: of the method `prompt` alone, with as many slots as a generation has points.
        batch: tensors of one batch, rows first; repeated for every prompt.
        losses: the losses of a repeated batch, [rows]. It runs without gradients.

    Raises ConfigurationError for another delta, or more points than slots.
    """
    _check_prompt(delta)

    def objective(prompts: Tensor) -> Tensor:
        points = len(prompts)
        if points > delta.slots:
            raise ConfigurationError(
                f"A generation of {points} prompts needs as many slots; {delta.name} has "
                f"{delta.slots}. Attach it with slots={points}."
            )
        for slot, prompt in enumerate(prompts):
            write_prompt(delta, prompt, slot)
        rows = len(next(iter(batch.values())))
        repeated = {
            name: value.repeat(points, *[1] * (value.dim() - 1)) for name, value in batch.items()
        }
        with torch.no_grad(), delta.route([k for k in range(points) for _ in range(rows)]):
            found: Tensor = losses(repeated).float().view(points, rows).mean(1)
        return found

    return objective


def write_prompt(delta: Delta, prompt: Tensor, slot: int = 0) -> None:
    """Sets the virtual tokens of one slot.

    Args:
        delta: of the method `prompt` alone.
        prompt: [length, width].
        slot: which.

    Raises ConfigurationError for another delta or slot, or a prompt of another shape.
    """
    name = _check_prompt(delta)
    delta.check_slot(slot)
    wanted = tuple(delta.tensors(slot)[name].shape)
    if tuple(prompt.shape) != wanted:
        raise ConfigurationError(
            f"{delta.name} holds prompts of {wanted}; found {tuple(prompt.shape)}."
        )
    delta.bank.write(slot, {name: prompt.to(delta.tensors(slot)[name].device)})


def prompt_of(delta: Delta, slot: int = 0) -> Tensor:
    """The virtual tokens of one slot, [length, width]. Raises ConfigurationError as above."""
    name = _check_prompt(delta)
    delta.check_slot(slot)
    return delta.tensors(slot)[name].clone()


def _check_prompt(delta: Delta) -> str:
    """The name of the one leaf of a prompt."""
    names = [] if isinstance(delta.bank, InPlaceBank) else list(delta.tensors(0))
    if [part.method.face for part in delta.parts] != ["embed"] or len(names) != 1:
        raise ConfigurationError(
            "Black-box tuning searches a prompt that is alone: attach 'prompt(length=...)'; found "
            f"{delta.name}."
        )
    return names[0]
