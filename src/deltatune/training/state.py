"""What a run is while it trains, and what it has measured when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltatune.core.errors import ArtefactError
from deltatune.core.policy import Policies
from deltatune.training.budget import Spent
from deltatune.training.sampler import Order

__all__ = ["Evaluation", "Facts", "Result", "RunState"]

Ending = Literal["budget", "patience"]


@dataclass(frozen=True)
class Evaluation:
    """One point of a convergence curve.

    Attributes:
        step: optimiser steps taken.
        seconds: of training until then, without evaluation.
        scores: what the validation gave; None for a score that is not a finite number.
    """

    step: int
    seconds: float
    scores: Mapping[str, float | None]


@dataclass
class Facts:
    """The measured numbers of a run, as they grow.

    Attributes:
        steps: optimiser steps taken.
        forwards: forward passes taken.
        rows: rows seen, with repetition.
        tokens: input tokens seen, without padding and without targets.
        seconds: of training, without evaluation and checkpoints.
        losses: the mean loss of each step.
        history: the evaluations.
        best_step: the step of the best evaluation so far.
        best_score: its score.
        stale: evaluations since the best.
        peak_memory: the highest resident memory of the process in bytes.
        peak_device_memory: the highest memory taken on the accelerator in bytes, 0 without one.
        ending: why the run ended; None while it goes on.
    """

    steps: int = 0
    forwards: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[Evaluation] = field(default_factory=list)
    best_step: int | None = None
    best_score: float | None = None
    stale: int = 0
    peak_memory: int = 0
    peak_device_memory: int = 0
    ending: Ending | None = None

    @property
    def spent(self) -> Spent:
        """What a budget looks at."""
        return Spent(self.steps, self.seconds, self.tokens)

    def record(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Facts:
        """The inverse of `record`."""
        history = [Evaluation(**point) for point in record["history"]]
        return cls(**{**record, "history": history})


@dataclass(frozen=True)
class Result:
    """What a finished run has measured.

    Attributes:
        steps: optimiser steps taken.
        epochs: passes over the rows, with the fraction of the last.
        rows: rows seen, with repetition.
        tokens: input tokens seen, without padding and without targets.
        seconds: of training, without evaluation and checkpoints, over all resumptions.
        losses: the mean loss of each step.
        history: the evaluations, as points of a convergence curve.
        best_step: the step of the best evaluation; None without a metric.
        best_score: its score.
        kept_step: the step whose tensors the run holds now: the best, or the last.
        peak_memory: the highest resident memory of the process in bytes.
        peak_device_memory: the highest memory taken on the accelerator in bytes, 0 without one.
        ending: "budget", or "patience" after early stopping.
    """

    steps: int
    epochs: float
    rows: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]
    history: tuple[Evaluation, ...]
    best_step: int | None
    best_score: float | None
    kept_step: int
    peak_memory: int
    peak_device_memory: int
    ending: Ending


@dataclass
class RunState:
    """Everything of one run that changes while it trains.

    Several runs over one base are several of these; nothing of a run lives in a local variable.

    Attributes:
        sampler: the place in the data.
        optimiser: with its own moments and rates.
        policies: with what they remember.
        rates: the highest learning rate of each parameter group.
        facts: the measured numbers.
        best: the trained tensors of the best evaluation, on the CPU; empty if none is kept.
    """

    sampler: Order
    optimiser: Optimizer
    policies: Policies
    rates: list[float]
    facts: Facts = field(default_factory=Facts)
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, sampler: Order, optimiser: Optimizer, policies: Policies) -> RunState:
        """The state of a run before its first step."""
        rates = [float(group["lr"]) for group in optimiser.param_groups]
        return cls(sampler, optimiser, policies, rates)

    def set_rates(self, factor: float) -> float:
        """Sets every group to `factor` of its highest rate; returns the largest rate."""
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return factor * max(self.rates)

    def forget(self) -> None:
        """Drops what only goes on training needs, when a run is done."""
        self.best = {}
        self.policies.memory.clear()
        self.optimiser.state.clear()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the state as tensors, by name."""
        held = {f"best/{name}": tensor for name, tensor in self.best.items()}
        held |= {f"policy/{name}": tensor for name, tensor in self.policies.tensors().items()}
        for place, name, value in self._moments():
            if isinstance(value, Tensor):
                held[f"optimiser/{place}/{name}"] = value
        return held

    def record(self) -> dict[str, Any]:
        """What a checkpoint must hold of the state as JSON values."""
        scalars: dict[str, dict[str, Any]] = {}
        host: list[str] = []
        for place, name, value in self._moments():
            if not isinstance(value, Tensor):
                scalars.setdefault(str(place), {})[name] = value
            elif value.device.type == "cpu":
                host.append(f"optimiser/{place}/{name}")
        return {
            "epoch": self.sampler.epoch,
            "index": self.sampler.index,
            "facts": self.facts.record(),
            "optimiser": scalars,
            # torch keeps some counters on the CPU although their parameter is not there.
            "host": host,
        }

    def restore(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `record` and `tensors`. Raises ArtefactError if they do not fit."""
        self.sampler.restore(record["epoch"], record["index"])
        self.facts = Facts.read(record["facts"])
        self.best = {
            name.removeprefix("best/"): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith("best/")
        }
        if self.facts.ending is None:
            policy = {n: t for n, t in tensors.items() if n.startswith("policy/")}
            self.policies.restore({n.removeprefix("policy/"): t for n, t in policy.items()})
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        host = set(record["host"])
        # Not `load_state_dict`: it casts moments to the parameter's dtype, which loses bits.
        for name, tensor in tensors.items():
            if name.startswith("optimiser/"):
                _, place, key = name.split("/", 2)
                if int(place) >= len(parameters):
                    raise ArtefactError("The checkpoint holds more parameters than the run trains.")
                parameter = parameters[int(place)]
                device = torch.device("cpu") if name in host else parameter.device
                # A copy: what is read from a file may be a view of the file.
                self.optimiser.state[parameter][key] = tensor.to(device, copy=True)
        for place, values in record["optimiser"].items():
            self.optimiser.state[parameters[int(place)]].update(values)

    def _moments(self) -> list[tuple[int, str, Any]]:
        """The optimiser's state as (place of the parameter, name, value)."""
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        return [
            (place, name, value)
            for place, parameter in enumerate(parameters)
            for name, value in self.optimiser.state.get(parameter, {}).items()
        ]
