"""A comparison: every method on every task, each arm at a learning rate chosen by one rule."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from deltatune.core.errors import ConfigurationError, DataError, UnknownNameError
from deltatune.core.grammar import parse
from deltatune.study.cell import Arm, Cell, CellResult, Strict
from deltatune.study.runner import Execute, Outcome, Pool, Together, Watch, run
from deltatune.study.search import Rates, Search
from deltatune.study.select import Choice, Grid, Split, beyond, choose
from deltatune.study.source import code_version
from deltatune.study.store import Note, Store
from deltatune.training.budget import parse as parse_budget
from deltatune.training.settings import Settings

__all__ = [
    "NOTE",
    "TARGETS",
    "UNAVAILABLE",
    "Comparison",
    "Describe",
    "Group",
    "preset",
    "run_comparison",
]

# (backbone, task, protocol) -> further fields of a cell, `revision` and `data`
Describe: TypeAlias = Callable[[str, str, str], dict[str, Any]]

NOTE = "comparison"  # the name under which a store keeps what was compared
UNAVAILABLE = "unavailable"  # what of the note says which tasks could not be had
TARGETS = "transfer_to"  # the option of a cell that names the tasks it is tested on, too


class Comparison(Strict):
    """What is compared.

    Attributes:
        backbones: names that `load_backbone` takes.
        tasks: ids of tasks, in the order of the table's rows.
        methods: method expressions, in the order of the table's columns.
        at: where every method sits that does not say it itself.
        seeds: the first n whole numbers.
        budget: of every cell, "300 steps".
        settings: of every cell; the learning rate is set for each arm.
        grid: the learning rates that every arm tries, with `selection_seeds` seeds; or how many of
            them are searched between two bounds.
        selection_seeds: seeds that the choice of the learning rate is made with.
        selection: the rows that it is made on. On "test", scores are those of the luckiest rate.
        by_method: what the settings of a method are where they are others, {"lora": {"seed": 1}}.
        search_tasks: where the learning rates are tried; all tasks if there is none.
        extend: how many values may be added to an arm's grid while its best value is at an edge.
        per: whether an arm has one rate for all tasks ("arm") or one for each ("task").
        protocol: the rule by which rows are split.
        options: see `Cell.options`.
    """

    backbones: Annotated[tuple[str, ...], Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    at: str | None = None
    seeds: Annotated[int, Field(ge=1)] = 1
    budget: str = "300 steps"
    settings: Settings = Settings()
    grid: Rates = Grid()
    selection_seeds: Annotated[int, Field(ge=1)] = 1
    selection: Split = "validation"
    by_method: dict[str, dict[str, Any]] = Field(default_factory=dict)
    search_tasks: tuple[str, ...] = ()
    extend: Annotated[int, Field(ge=0)] = 0
    per: Literal["arm", "task"] = "arm"
    protocol: str = "clean"
    options: dict[str, int | float | str | bool | None] = Field(default_factory=dict)

    @field_validator("budget", mode="before")
    @classmethod
    def _canonical_budget(cls, value: object) -> str:
        return str(parse_budget(str(value)))

    @field_validator("methods")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse(value)) for value in values)

    @field_validator("by_method")
    @classmethod
    def _canonical_keys(cls, values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {str(parse(method)): changed for method, changed in values.items()}

    @field_validator("backbones", "tasks", "methods", "search_tasks")
    @classmethod
    def _distinct(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ConfigurationError(f"{', '.join(repeated)} stands twice. Name each once.")
        return values

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        for task in self.search_tasks:
            if task not in self.tasks:
                raise UnknownNameError("task to search on", task, self.tasks)
        for method, changed in self.by_method.items():
            if method not in self.methods:
                raise UnknownNameError("method with settings of its own", method, self.methods)
            if "learning_rate" in changed:
                raise ConfigurationError(
                    f"The learning rate of {method} comes from the grid. Leave it out of by_method."
                )
            self.settings_of(method)
        if self.search_tasks and self.per == "task":
            raise ConfigurationError(
                "A rate for each task is searched on each of them. Leave search_tasks out, or "
                "choose one rate for each arm with per='arm'."
            )
        if self.extend and isinstance(self.grid, Search):
            raise ConfigurationError(
                f"A search keeps to its bounds, {self.grid}. Widen them, or leave extend out."
            )
        return self

    def settings_of(self, method: str) -> Settings:
        """How one method is trained. Raises what `Settings` does."""
        return Settings(**{**dict(self.settings), **self.by_method.get(method, {})})

    def without(self, tasks: Collection[str]) -> Comparison:
        """The comparison on its other tasks; what is trained there is tested on these alone."""
        names = ("tasks", "search_tasks")
        left = {name: tuple(t for t in getattr(self, name) if t not in tasks) for name in names}
        options = dict(self.options)
        if targets := options.get(TARGETS):
            named = [target.strip() for target in str(targets).split("+")]
            options[TARGETS] = " + ".join(target for target in named if target not in tasks)
        return self.model_copy(update={**left, "options": options})

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The columns of the table."""
        return tuple(
            Arm(backbone=backbone, method=method, at=self.at)
            for backbone in self.backbones
            for method in self.methods
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """The arms, each with tasks that share one learning rate."""
        shares = [self.tasks] if self.per == "arm" else [(task,) for task in self.tasks]
        return tuple(Group(arm, tasks) for tasks in shares for arm in self.arms)


@dataclass(frozen=True)
class Group:
    """An arm and the tasks on which it has one learning rate."""

    arm: Arm
    tasks: tuple[str, ...]

    def holds(self, cell: Cell) -> bool:
        """Whether the cell belongs to the group."""
        return cell.arm == self.arm and cell.task in self.tasks


def preset(method: str) -> float:
    """Returns the learning rate to start from: that of the most sensitive of the methods."""
    return min(part.learning_rate for part in parse(method))


def run_comparison(
    comparison: Comparison,
    execute: Execute,
    store: Store,
    *,
    name: str = NOTE,
    describe: Describe = lambda backbone, task, protocol: {},
    together: Together | None = None,
    pool: Pool | None = None,
    retry: bool = False,
    watch: Watch | None = None,
) -> Outcome:
    """Runs a comparison, or what is left of it.

    First every value of the grids with the seeds of the selection, on the tasks to search on, then
    the chosen ones with all seeds on all tasks. Of an arm none of whose values ran to its end on
    every task searched, the first value is shown.

    A task whose rows cannot be had is left out, and the store says so; the same call runs it once
    they can.

    Args:
        comparison: what is compared.
        execute: runs one cell.
        store: where results are kept; the report is made from it.
        name: of the note in which the store keeps what was compared.
        describe: (backbone, task, protocol) -> further fields of a cell, `revision` and `data`.
        together: runs several cells at once; None: each is run by itself.
        pool: where they are run; None: in this process.
        retry: whether cells that failed before this call are tried again.
        watch: told of every cell.

    Returns:
        The results of the final cells.

    Raises:
        DataError: the rows of no task can be had, or of no task to search learning rates on.
    """
    describe = functools.cache(describe)
    missing = _unavailable(comparison, describe)
    # A cell of the search is a final one too: what fails again there has been tried again.
    again = store.failed() if retry else {}

    def carry_out(cells: Iterable[Cell]) -> Outcome:
        return run(cells, execute, store, together=together, pool=pool, retry=again, watch=watch)

    search = _Search(comparison, missing, carry_out, store, name, describe)
    if comparison.grid.tried:
        search.try_rates()
        for _ in range(comparison.extend):
            if not search.extend():
                break
            search.try_new()
    return search.run_final()


def _unavailable(comparison: Comparison, describe: Describe) -> dict[str, str]:
    """Task -> why its rows cannot be had. Raises DataError if nothing can be done without."""
    missing: dict[str, str] = {}
    for task in comparison.tasks:
        try:
            describe(comparison.backbones[0], task, comparison.protocol)
        except DataError as error:
            missing[task] = str(error)
    left = comparison.without(missing)
    if not left.tasks or (comparison.search_tasks and not left.search_tasks):
        purpose = "" if not left.tasks else " to search learning rates on"
        why = " ".join(dict.fromkeys(missing.values()))
        raise DataError(f"The rows of no task{purpose} can be had. {why}")
    return missing


class _Search:
    """The grids of all groups as they grow, and the cells that were planned on the way."""

    def __init__(
        self,
        asked: Comparison,
        missing: Mapping[str, str],
        carry_out: Callable[[Iterable[Cell]], Outcome],
        store: Store,
        name: str,
        describe: Describe,
    ) -> None:
        self.comparison, self.store, self.name = asked.without(missing), store, name
        self._asked, self._missing = asked, missing
        self._carry_out, self._describe = carry_out, describe
        self._rates = {
            group: list(asked.grid.rates(preset(group.arm.method)))
            for group in self.comparison.groups
        }
        self._searched: dict[str, tuple[Cell, CellResult | None]] = {}

    def try_rates(self) -> None:
        """Runs the grids, or one round of trials after the other."""
        grid = self.comparison.grid
        if not isinstance(grid, Search):
            self.try_new()
            return
        for _ in range(grid.trials):
            for group, rates in self._rates.items():
                means = self.choice(group).means
                known = {rate: means.get(rate, -math.inf) for rate in rates}
                rates.append(grid.propose(preset(group.arm.method), known))
            self.try_new()

    def try_new(self) -> None:
        """Runs what is new of the rates."""
        seeds = range(min(self.comparison.selection_seeds, self.comparison.seeds))
        tasks = self.comparison.search_tasks or self.comparison.tasks
        cells = {cell.id: cell for cell in self._cells(self._rates, seeds, tasks)}
        self._keep_note(searched=list(cells), final=[])
        new = [cell for cell in cells.values() if cell.id not in self._searched]
        outcome = self._carry_out(new)
        self._searched.update({c.id: (c, outcome.done.get(c.id)) for c in new})

    def extend(self) -> bool:
        """Adds a value beyond the edge to each grid whose best value is at it; whether any was."""
        grown = False
        for group, rates in self._rates.items():
            choice = self.choice(group)
            if choice.at_edge and choice.rate is not None:
                rates.append(beyond(rates, choice.rate))
                grown = True
        return grown

    def choice(self, group: Group) -> Choice:
        """What the results so far say of one group."""
        held = (tried for tried in self._searched.values() if group.holds(tried[0]))
        return choose(held, self.comparison.selection)

    def run_final(self) -> Outcome:
        """Runs the chosen rates with all seeds."""
        chosen: dict[Group, list[float]] = {}
        for group, rates in self._rates.items():
            rate = self.choice(group).rate
            chosen[group] = [rates[0] if rate is None else rate]
        cells = list(self._cells(chosen, range(self.comparison.seeds), self.comparison.tasks))
        self._keep_note(searched=list(self._searched), final=[cell.id for cell in cells])
        return self._carry_out(cells)

    def _cells(
        self, rates: Mapping[Group, Sequence[float]], seeds: range, tasks: Sequence[str]
    ) -> Iterator[Cell]:
        for task in tasks:
            for group, values in rates.items():
                if task in group.tasks:
                    for rate, seed in itertools.product(values, seeds):
                        yield self._cell(group.arm, task, rate, seed)

    def _cell(self, arm: Arm, task: str, rate: float, seed: int) -> Cell:
        methods = tuple(sorted({method.name for method in parse(arm.method)}))
        return Cell(
            backbone=arm.backbone,
            method=arm.method,
            at=arm.at,
            task=task,
            protocol=self.comparison.protocol,
            seed=seed,
            budget=self.comparison.budget,
            settings=self.comparison.settings_of(arm.method).model_copy(
                update={"learning_rate": rate}
            ),
            options=self.comparison.options,
            code=code_version(methods),
            **self._describe(arm.backbone, task, self.comparison.protocol),
        )

    def _keep_note(self, searched: list[str], final: list[str]) -> None:
        """Writes down what is compared and which cells belong to it, for the report.

        Another process may be further with the same comparison: what it wrote down stays.
        """
        subject = {"comparison": self._asked.model_dump(mode="json"), "code": code_version()}
        before = self.store.note(self.name) or {}
        if {key: before.get(key) for key in subject} == subject:
            searched = list(dict.fromkeys([*before["searched"], *searched]))
            final = final or before["final"]
        value = {**subject, "searched": searched, "final": final}
        if self._missing:
            value[UNAVAILABLE] = dict(self._missing)
        if before != value:
            self.store.append(Note(name=self.name, value=value))
