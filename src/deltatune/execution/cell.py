"""Cells, carried out: one by itself, or several over one frozen base.

Here tasks, backbones, the kernel, training and evaluation meet. The test rows are looked at once,
after everything is decided.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from deltatune.core.attaching import attach
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, DeltatuneError
from deltatune.core.grammar import parse
from deltatune.core.plan import plan
from deltatune.core.run import Run
from deltatune.execution.prepared import Prepared, prepare
from deltatune.study.cell import Cell, CellResult
from deltatune.tasks.records import find_task, names_of
from deltatune.training.loop import fit
from deltatune.training.many import Job, Outcome, fit_many
from deltatune.training.memory import VALUES_AND_TRAINING, largest_count
from deltatune.training.mixture import Mixture
from deltatune.training.progress import Progress
from deltatune.training.state import Result
from deltatune.training.tasks import fit_tasks
from deltatune.training.trunk_cache import TrunkCache

__all__ = ["Told", "attached", "execute", "execute_together", "shared_base"]

Told: TypeAlias = Callable[[Cell, CellResult | DeltatuneError], None]


def execute(
    cell: Cell,
    *,
    data: str | Path | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
) -> CellResult:
    """Carries out a cell.

    Args:
        cell: what to do.
        data: where task rows are, see `Task.load`.
        folder: keeps `run/`, from which an interrupted cell goes on, and `delta/`, the artefact, or
            `deltas/` with one for each of several tasks; None keeps nothing.
        progress: what shows the training.
        trunk_cache: see `fit`; a control, below which nothing is frozen, goes without.

    Raises:
        DeltatuneError: whatever is wrong with names, rows, settings or the run itself.
    """
    started = time.perf_counter()
    ready = prepare(cell, data=data, folder=folder)
    with attached(ready.attach()) as delta:
        ready.begin()
        result = _fit_stages(ready, delta, progress, trunk_cache)
        memory = result.peak_device_memory or result.peak_memory
        return ready.finish(delta, result, seconds=time.perf_counter() - started, memory=memory)


def _fit_stages(
    ready: Prepared, delta: Delta, progress: Progress | None, trunk_cache: TrunkCache | None
) -> Result:
    """Trains a delta, one stage after the other where it has any: each with a budget, settings, an
    optimiser and a schedule of its own. What lies below changes from stage to stage, so that
    nothing of it is cached.

    Returns what all have measured, one after the other; the scores kept are those of the last.
    """
    stages = [*range(len(ready.expression.stages))] or [None]
    cached = None if ready.expression.in_place or len(stages) > 1 else trunk_cache
    results = []
    for stage in stages:
        delta.stage = stage
        common: dict[str, Any] = {
            "settings": ready.settings_of(stage),
            "budget": ready.budget_of(stage),
            "metric": ready.goals.metric,
            "folder": ready.run_folder(stage),
            "progress": progress,
            "trunk_cache": cached,
        }
        if isinstance(ready.rows, Mixture):
            results.append(
                fit_tasks(delta, ready.rows, ready.collate, validate=ready.validations, **common)
            )
        else:
            results.append(
                fit(Run(delta), ready.rows, ready.collate, validate=ready.validate, **common)
            )
    delta.stage = None
    return functools.reduce(_followed, results)


def _followed(first: Result, second: Result) -> Result:
    """Two stages as one run."""
    later = tuple(
        replace(one, step=first.steps + one.step, seconds=first.seconds + one.seconds)
        for one in second.history
    )
    return replace(
        second,
        steps=first.steps + second.steps,
        epochs=first.epochs + second.epochs,
        rows=first.rows + second.rows,
        tokens=first.tokens + second.tokens,
        seconds=first.seconds + second.seconds,
        losses=first.losses + second.losses,
        history=first.history + later,
        best_step=None if second.best_step is None else first.steps + second.best_step,
        kept_step=first.steps + second.kept_step,
        peak_memory=max(first.peak_memory, second.peak_memory),
        peak_device_memory=max(first.peak_device_memory, second.peak_device_memory),
    )


def shared_base(cell: Cell) -> str | None:
    """Names the base with its deltas that a cell needs: cells of one name can be trained together.

    None for a cell that must be alone: it trains the backbone itself, or with its dropout, or in
    stages, or on several tasks, or says how many tokens a pass may have.
    """
    expression = parse(cell.method).at(cell.at)
    alone = cell.settings.base_dropout or cell.settings.tokens_per_pass is not None
    if alone or expression.in_place or expression.stages or len(names_of(cell.task)) > 1:
        return None
    kept = (cell.options.get(name) for name in ("dtype", "quantise", "error_rank"))
    base = cell.backbone, cell.revision, _width(cell.task), *kept
    shared = cell.settings.precision, cell.settings.packing
    return repr((*base, str(expression), *shared))


@functools.lru_cache(maxsize=64)
def _width(task: str) -> int | None:
    return find_task(task).head_width


def execute_together(
    cells: Sequence[Cell],
    told: Told,
    *,
    slots: int,
    tokens: int = 2048,
    data: str | Path | None = None,
    folder: Callable[[Cell], Path | None] = lambda cell: None,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
) -> None:
    """Carries out cells of one `shared_base`, several at once.

    What comes out is what `execute` gives, up to the order of sums; but time is a cell's share of
    that of all, and memory is not measured.

    Args:
        cells: what to do.
        told: called with each cell when it ends, or cannot begin.
        slots: how many at once.
        tokens: see `fit_many`; a longer row raises it.
        data, progress, trunk_cache: see `execute`.
        folder: that of each cell.

    Raises:
        ConfigurationError: there is no slot, or so many do not fit into memory.
    """
    if slots < 1:
        raise ConfigurationError(f"{slots} runs at once train nothing. Give at least one slot.")
    ready: list[Prepared] = []
    for cell in cells:
        try:
            ready.append(prepare(cell, data=data, folder=folder(cell)))
        except DeltatuneError as error:
            told(cell, error)
    if not ready:
        return
    model = ready[0].backbone.model
    slots = min(slots, len(ready))
    _check_memory(ready[0], slots)
    seeds = [one.cell.seed for one in ready]
    expressions = [one.expression for one in ready[:slots]]
    with attached(attach(model, expressions, seed=seeds[:slots])) as delta:

        def ended(number: int, slot: int, outcome: Outcome) -> None:
            if isinstance(outcome, DeltatuneError):
                told(ready[number].cell, outcome)
                return
            seconds = outcome.seconds + ready[number].evaluating
            with delta.route([slot]):
                told(
                    ready[number].cell,
                    ready[number].finish(delta, outcome, slot=slot, seconds=seconds, memory=None),
                )

        longest = max(len(row.input_ids) for one in ready for row in one.rows)
        fit_many(
            delta,
            [_job(one) for one in ready],
            ready[0].collate,
            tokens=max(tokens, longest),
            progress=progress,
            trunk_cache=trunk_cache,
            ended=ended,
        )


def _job(ready: Prepared) -> Job:
    return Job(
        ready.rows,
        ready.settings,
        ready.budget_of(None),
        ready.validate,
        ready.goals.metric,
        ready.run_folder(),
        ready.cell.seed,
        ready.expression,
    )


def _check_memory(ready: Prepared, slots: int) -> None:
    model = ready.backbone.model
    entries = plan(model, ready.expression).trainable
    device = next(model.parameters()).device
    largest = largest_count(entries * VALUES_AND_TRAINING, device)
    if slots > largest:
        raise ConfigurationError(
            f"{slots} runs of {entries:,} trained entries each do not fit into the free memory of "
            f"{device}. At most {largest} do, beside what the batches need."
        )


@contextmanager
def attached(delta: Delta) -> Iterator[Delta]:
    """A delta that is detached at the end, whatever happens."""
    try:
        yield delta
    finally:
        delta.detach()
