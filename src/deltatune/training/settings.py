"""How a run trains: one frozen record; the arms of a comparison differ in its rate alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltatune.core.errors import ConfigurationError, UnknownNameError

__all__ = ["SCHEDULES", "Settings"]

SCHEDULES = ("constant", "cosine", "linear")

_Count = Annotated[int, Field(gt=0)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Settings(BaseModel):
    """How a run trains.

    Raises ConfigurationError for a value that cannot be meant, UnknownNameError for an unknown key
    or schedule. Names of optimisers are looked up when a run begins, because that needs torch.

    Attributes:
        optimiser: a class of `torch.optim` in small letters ("adamw", "sgd", "rmsprop", ...), or
            "adafactor", which is that of transformers with an explicit learning rate.
        learning_rate: the highest rate of the schedule; None where the caller puts the preset of
            the method, which must have happened before `fit`.
        weight_decay: handed to the run, which decides what of it decays.
        betas: of the optimisers that have them; None for their own default.
        optimiser_options: further arguments of the optimiser by name, e.g. {"momentum": 0.9}.
        schedule: "constant", "linear" or "cosine" over the budget, after the warm-up.
        warmup_steps: optimiser steps of linear warm-up; for budgets counted in steps or epochs.
        warmup_ratio: the same as a fraction of the budget, for every budget. One of the two.
        max_norm: gradients are clipped to this Euclidean norm, each slot by itself; None: never.
        per_device_batch_size: rows of one forward pass.
        accumulation: forward passes of one optimiser step.
        tokens_per_pass: how many input tokens, with padding, one forward pass may have. The rows of
            a step are sorted by length and cut by this budget instead of by their number. None:
            they are cut by number.
        packing: whether the rows of a pass lie behind each other in fewer and wider ones, so that
            next to no padding is computed. What each row gives stays the same; draws of dropout do
            not.
        precision: "fp32", or "bf16" for autocast; trained tensors and their updates stay as they
            are.
        evaluation_every: optimiser steps between evaluations; None: only at the end.
        patience: evaluations without a better score after which the run stops; None: never.
        keep_best: whether the run ends with the tensors of its best evaluation, not with the last.
        seed: of the order of rows and of the base's dropout.
        length_grouped: whether batches hold rows of similar length (less padding).
        base_dropout: whether the base's own dropout is on in training, as it is in usual full
            fine-tuning. A comparison must set it equal in all arms.
        base_dropout_steps: optimiser steps after which `base_dropout` ends; None: it does not.
        checkpoint_every: optimiser steps between checkpoints, if a folder is given; None: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimiser: str = "adamw"
    learning_rate: _Positive | None = None
    weight_decay: _NonNegative = 0.0
    betas: tuple[_Fraction, _Fraction] | None = None
    optimiser_options: dict[str, bool | int | float] = Field(default_factory=dict)
    schedule: str = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_ratio: _Fraction = 0.0
    max_norm: _Positive | None = 1.0
    per_device_batch_size: _Count = 16
    accumulation: _Count = 1
    tokens_per_pass: _Count | None = None
    packing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluation_every: _Count | None = None
    patience: _Count | None = None
    keep_best: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    length_grouped: bool = False
    base_dropout: bool = False
    base_dropout_steps: _Count | None = None
    checkpoint_every: _Count | None = 200

    if (
        not TYPE_CHECKING
    ):  # type checkers keep the constructor that pydantic derives from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _explained(error, values) from None

    @model_validator(mode="after")
    def _sensible(self) -> Settings:
        if self.schedule not in SCHEDULES:
            raise UnknownNameError("schedule", self.schedule, SCHEDULES)
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.patience is not None and self.evaluation_every is None:
            raise ValueError("patience counts evaluations: set evaluation_every too")
        if self.base_dropout_steps is not None and not self.base_dropout:
            raise ValueError("base_dropout_steps says when base_dropout ends: set that too")
        if not all(math.isfinite(value) for value in self.optimiser_options.values()):
            raise ValueError("optimiser_options must be finite numbers")
        return self

    def drops_out(self, step: int) -> bool:
        """Whether the base's dropout is on in a step, counted from 0."""
        lasts = self.base_dropout_steps is None or step < self.base_dropout_steps
        return self.base_dropout and lasts

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step: `per_device_batch_size * accumulation`."""
        return self.per_device_batch_size * self.accumulation


def _explained(error: ValidationError, values: Mapping[str, Any]) -> ConfigurationError:
    """The first complaint of pydantic as one of our errors."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigurationError):
        return cause
    where = ".".join(str(part) for part in first["loc"]) or "training settings"
    if first["type"] == "extra_forbidden":
        return UnknownNameError("training setting", where, Settings.model_fields)
    found = "" if where not in values else f" Found {values[where]!r}."
    return ConfigurationError(f"{where}: {first['msg'].removeprefix('Value error, ')}.{found}")
