"""A cell: one training run with its evaluation, known by its content."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.training.budget import parse_stages
from deltatune.training.settings import Settings

__all__ = ["Arm", "Cell", "CellResult", "Point", "Strict", "explained"]


class Strict(BaseModel):
    """A frozen record that refuses unknown keys, with our own errors.

    Raises UnknownNameError for an unknown key, ConfigurationError for a value that cannot be meant.
    """

    # Infinities and NaN (a Pearson correlation without variance) survive the journal as strings.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    if (
        not TYPE_CHECKING
    ):  # type checkers keep the constructor that pydantic derives from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise explained(error, type(self)) from None


def explained(error: ValidationError, model: type[BaseModel]) -> ConfigurationError:
    """Returns the first complaint of pydantic about `model` as one of our errors."""
    # An unknown key is often the reason why another one is missing.
    order = ("extra_forbidden", "missing")
    complaints = error.errors(include_url=False)
    first = min(complaints, key=lambda e: order.index(e["type"]) if e["type"] in order else 2)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigurationError):
        return cause
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UnknownNameError(f"key of a {model.__name__.lower()}", where, model.model_fields)
    if first["type"] == "missing":
        return ConfigurationError(f"A {model.__name__.lower()} needs a value for {where!r}.")
    message = first["msg"].removeprefix("Value error, ")
    return ConfigurationError(f"{where or model.__name__}: {message}. Found {first['input']!r}.")


class Arm(Strict):
    """What cells of one column of a table have in common: a backbone and a method on it."""

    backbone: str
    method: str
    at: str | None = None

    def __str__(self) -> str:
        return self.method if self.at is None else f"{self.method} at {self.at}"


class Cell(Strict):
    """One run of a study. Two cells of the same content are the same cell and have the same id.

    Attributes:
        backbone: a name that `load_backbone` takes.
        revision: which weights those are: the hub's commit or a digest; None where unknown.
        method: a method expression in its canonical form, "lora(rank=8) + bitfit()".
        at: where the method sits, if not where the expression says.
        task: the task's id; "one + another" for a delta that learns several.
        protocol: the rule by which the task's rows are split ("clean" or "faithful").
        data: the version of the task's record and a digest of its rows; None where unknown.
        seed: of everything that is drawn: leaves, order of rows, dropout.
        budget: how long to train, "300 steps" or `Steps(300)`; brought into one spelling. A method
            of stages has it for each of them, or one for each: "200 steps >> 2 epochs".
        settings: how to train. Its seed is always that of the cell.
        stages: what the settings are in each stage of the method where they are others,
            `({"learning_rate": 0.3}, {"optimiser": "sgd"})`; empty where they are the same.
        options: what else the run depends on, by name: row limits, lengths.
        code: the code version, see `study.source.code_version`.
    """

    backbone: str
    revision: str | None = None
    method: str
    at: str | None = None
    task: str
    protocol: str = "clean"
    data: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    budget: str
    settings: Settings = Settings()
    stages: tuple[dict[str, Any], ...] = ()
    options: dict[str, int | float | str | bool | None] = Field(default_factory=dict)
    code: str = ""

    @field_validator("budget", mode="before")
    @classmethod
    def _canonical_budget(cls, value: object) -> str:
        return " >> ".join(map(str, parse_stages(str(value))))

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        settings = values.get("settings", Settings())
        if isinstance(settings, dict):
            settings = Settings(**settings)
        return {
            **values,
            "settings": settings.model_copy(update={"seed": values.get("seed", 0)}),
        }

    @model_validator(mode="after")
    def _stages_can_be_meant(self) -> Cell:
        for stage in range(len(self.stages)):
            if "seed" in self.stages[stage]:
                raise ConfigurationError("All stages have the seed of the cell. Give `seed` there.")
            self.settings_of(stage)
        return self

    def settings_of(self, stage: int) -> Settings:
        """The settings of a stage, counted from 0."""
        changes = self.stages[stage] if self.stages else {}
        return Settings(**{**self.settings.model_dump(), **changes}) if changes else self.settings

    @functools.cached_property
    def id(self) -> str:
        """The first 128 bits of the SHA-256 of the cell's canonical JSON, 32 hex digits.

        How often a run saves checkpoints does not change its result and does not count.
        """
        content = self.model_dump(mode="json", exclude={"settings": {"checkpoint_every"}})
        if not self.stages:
            del content["stages"]  # ids of cells without are those of before there were any
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def arm(self) -> Arm:
        """The column of a table that the cell belongs to."""
        return Arm(backbone=self.backbone, method=self.method, at=self.at)

    @property
    def learning_rate(self) -> float | None:
        """The highest learning rate of the run."""
        return self.settings.learning_rate

    def with_learning_rate(self, rate: float) -> Cell:
        """Returns the same cell at another learning rate."""
        return self._changed(settings=self.settings.model_copy(update={"learning_rate": rate}))

    def with_seed(self, seed: int) -> Cell:
        """Returns the same cell with another seed."""
        return self._changed(seed=seed)

    def _changed(self, **fields: Any) -> Cell:
        return Cell(**{**{name: getattr(self, name) for name in Cell.model_fields}, **fields})

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:g}"
        return f"{self.backbone}, {self.arm}, {self.task}, seed {self.seed}{rate}"


class Point(Strict):
    """One moment of a training run.

    Attributes:
        step: optimiser steps done.
        seconds: of training so far.
        loss: mean training loss since the last point; None where it was not taken.
        validation: the task's metric on the validation rows, a fraction; None where not evaluated.
    """

    step: int
    seconds: float
    loss: float | None = None
    validation: float | None = None


class CellResult(Strict):
    """What came out of a cell. Nothing else is needed to report it.

    Attributes:
        metric: name of the task's own metric; of several tasks "average", over each one's own.
        scores: metric -> score on the test rows, fractions; holds `metric`.
        validation: metric -> score on the validation rows, of the tensors that were kept.
        measured: what else the cell's options asked for, by name, see `execution.measures`.
        majority: score of always answering the commonest label of the training rows; None where the
            task has no labels.
        category: the task's place in the paper's Table 1, "Classification/sentiment analysis";
            "Several tasks" where they are.
        status: "complete", or what the rows are instead: "partial", "proxy".
        notes: what must stand beside the score, one sentence each.
        trainable: scalars that training changed.
        stored: scalars that the artefact holds.
        base: scalars of the backbone.
        rows: split -> number of rows used.
        steps: optimiser steps done.
        seconds: of training, without evaluation.
        total_seconds: of the whole cell.
        memory: highest use of memory during training, in bytes; None where it was not measured.
        curve: moments of the run, in order.
        device: what it ran on, "cpu" or "cuda:0".
        machine: whose that is, see `study.machine`; "" where nobody said.
        versions: library -> version.
        artefact: the folder with the trained delta; None where none was kept.
    """

    metric: str
    scores: dict[str, float]
    validation: dict[str, float] = Field(default_factory=dict)
    measured: dict[str, float] = Field(default_factory=dict)
    majority: float | None = None
    category: str = "Other"
    status: str = "complete"
    notes: tuple[str, ...] = ()
    trainable: int
    stored: int = 0
    base: int
    rows: dict[str, int] = Field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    memory: int | None = None
    curve: tuple[Point, ...] = ()
    device: str = "cpu"
    machine: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    artefact: str | None = None

    @model_validator(mode="after")
    def _has_its_metric(self) -> CellResult:
        if self.metric not in self.scores:
            raise ValueError(f"scores hold {sorted(self.scores)} but not the metric {self.metric}")
        return self

    @property
    def score(self) -> float:
        """The task's own metric on the test rows, a fraction."""
        return self.scores[self.metric]

    @property
    def ratio(self) -> float:
        """Trained scalars as a fraction of the backbone's."""
        return self.trainable / self.base
