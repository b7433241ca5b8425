"""Many runs over one frozen base: `fit_many`.

Every run has a slot of one delta, its own data, order, optimiser, schedule, early stop, log and
checkpoint; a run that ends gives its slot to the next. In each step the rows of all runs are sorted
by length and cut into parts by a budget of tokens, whatever run they belong to, so that one pass of
the base serves them all; every row counts by the items of its own run, and reaches its own slot
alone. A run ends as it would alone, up to the order of sums. Runs that all have a slot from the
first step on end in the same bits again, also where they were interrupted.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import Accelerator  # type: ignore[import-untyped]

from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ArtefactError,
    ConfigurationError,
    DeltatuneError,
    TrainingError,
)
from deltatune.core.grammar import Expression
from deltatune.core.run import SlotRun
from deltatune.training.budget import Budget
from deltatune.training.loop import Loop, Validate, begin, epochs, serving
from deltatune.training.memory import TRAINING, largest_count
from deltatune.training.parts import check_lengths
from deltatune.training.progress import Progress, SilentProgress
from deltatune.training.random_state import isolated_random_state
from deltatune.training.settings import Settings
from deltatune.training.shared_passes import SharedPasses
from deltatune.training.state import Facts, Result
from deltatune.training.step import Chosen, Collate
from deltatune.training.trunk_cache import TrunkCache

__all__ = ["Ended", "Job", "Outcome", "fit_many"]

Outcome: TypeAlias = Result | DeltatuneError
Ended: TypeAlias = Callable[[int, int, Outcome], None]


@dataclass(frozen=True)
class Job:
    """One of the runs that share a base; see `fit` for what its fields are.

    Attributes:
        rows: the training data.
        settings: how to train. What concerns the base must be the same for all jobs: precision,
            packing, and no dropout of its own.
        budget: how long; seconds are those of its share.
        validate: scores of the run, called while every row goes through its slot.
        metric: the score that decides which step was best.
        folder: of the run.
        seed: of the values that its slot is set to before the run, and of dropout; None: the slot
            is trained as it is, which is possible only where every job has a slot of its own.
        expression: what the slot holds from then on; None: what it held before.
    """

    rows: Sequence[Any]
    settings: Settings
    budget: Budget
    validate: Validate | None = None
    metric: str | None = None
    folder: Path | None = None
    seed: int | None = None
    expression: Expression | None = None


def fit_many(
    delta: Delta,
    jobs: Sequence[Job],
    collate: Collate,
    *,
    tokens: int = 2048,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
    ended: Ended | None = None,
) -> list[Outcome]:
    """Trains as many jobs at once as a delta has slots, and the others as slots become free.

    The seconds of a run are its share of the time that the steps took, by tokens. A run that meets
    an error (a loss or gradient that is not finite, a damaged checkpoint) stops, and the others go
    on.

    Args:
        delta: attached; the first jobs train its slots in order.
        jobs: what is trained.
        collate: rows of any of the jobs to a batch of tensors with labels.
        tokens: how many input tokens, with padding, one pass may have; the jobs' own
            `tokens_per_pass` has no place here.
        progress: what shows the runs.
        trunk_cache: see `fit`; a row that several runs share is kept once for all of them.
        ended: called with the number of a job, its slot and its outcome when the job ends; the next
            one may take the slot after it.

    Returns:
        For each job what was measured, or the error that stopped it.

    Raises:
        ConfigurationError: jobs, slots, memory and budget of tokens do not fit each other.
    """
    accelerator, progress = Accelerator(), progress or SilentProgress()
    _check(delta, jobs, tokens)
    passes = SharedPasses(delta, collate, tokens, accelerator)
    together = _Together(delta, jobs, passes, progress, ended or (lambda *_: None))
    with isolated_random_state(accelerator.device):
        try:
            progress.start(f"training {len(jobs)} runs")
            with serving(trunk_cache, SlotRun(delta, 0), jobs[0].settings, _visits(jobs), progress):
                return together.run()
        finally:
            progress.stop()
            together.close()


def _check(delta: Delta, jobs: Sequence[Job], tokens: int) -> None:
    """Raises ConfigurationError if the jobs cannot be run together."""
    if not jobs:
        raise ConfigurationError("There are no jobs to train.")
    if len(jobs) > delta.slots and any(job.seed is None for job in jobs):
        raise ConfigurationError(
            f"{len(jobs)} jobs for {delta.slots} slots. Attach with slots={len(jobs)}, or give "
            "every job a seed, from which a slot that becomes free is drawn anew."
        )
    if delta.shares:
        raise ConfigurationError(
            f"The slots of {delta.name} share leaves, so that their runs are one. Train them by "
            "fit_tasks, on a Mixture of their rows."
        )
    device = next(delta.model.parameters()).device
    largest = largest_count(delta.bank.numel * TRAINING, device)
    if min(len(jobs), delta.slots) > largest:
        raise ConfigurationError(
            f"Training {min(len(jobs), delta.slots)} slots at once does not fit into the free "
            f"memory of {device}. Attach with slots={largest} at most, beside what batches need."
        )
    kinds = [job.settings for job in jobs]
    shared = {(one.precision, one.packing) for one in kinds}
    if len(shared) > 1 or any(one.base_dropout for one in kinds):
        raise ConfigurationError(
            "Runs that share a base have one precision, are packed or not, and its dropout is off: "
            "set base_dropout=False and the same precision and packing in every job."
        )
    if any(one.tokens_per_pass is not None for one in kinds):
        raise ConfigurationError(
            "Runs that share a base share its passes: leave tokens_per_pass out of the jobs, and "
            "give `tokens` for all of them."
        )
    for number, job in enumerate(jobs):
        check_lengths(job.rows, tokens, owner=f"Job {number}", setting="tokens")


@dataclass
class _Together:
    """All runs under way.

    Attributes:
        loops: slot to the run that has it, and `numbers` to that of its job.
        waiting: numbers of the jobs that have no slot yet.
        outcomes: job to what became of it.
    """

    delta: Delta
    jobs: Sequence[Job]
    passes: SharedPasses
    progress: Progress
    ended: Ended
    loops: dict[int, Loop] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def run(self) -> list[Outcome]:
        """Steps until every run has ended."""
        self.waiting.extend(range(len(self.jobs)))
        steps = 0
        while self._fill():
            steps += 1
            self._step(steps)
        return [self.outcomes[number] for number in range(len(self.jobs))]

    def close(self) -> None:
        """Leaves the model in evaluation mode and every log closed."""
        SlotRun(self.delta, 0).eval()
        for loop in self.loops.values():
            loop.log.close()

    def _fill(self) -> bool:
        """Gives free slots to jobs; whether any run is under way."""
        while self.waiting and len(self.loops) < self.delta.slots:  # a run may be done already
            free = [slot for slot in range(self.delta.slots) if slot not in self.loops]
            begun = [s for s in free[: len(self.waiting)] if self._begin(s, self.waiting.popleft())]
            if len(self.jobs) <= self.delta.slots:
                self._align()
            for slot in begun:
                self._open(slot)
        return bool(self.loops)

    def _begin(self, slot: int, number: int) -> bool:
        job = self.jobs[number]
        self.numbers[slot] = number
        try:
            if job.seed is not None:
                self.delta.redraw(slot, job.seed, job.expression)
            self.loops[slot] = _loop(SlotRun(self.delta, slot), job, self.passes)
        except DeltatuneError as error:
            self._end(slot, error)
        return slot in self.loops

    def _align(self) -> None:
        """Lets the runs go on from one moment of them all, or begin anew.

        Whose rows are in a pass shows in the last bits of all. What was cut off while checkpoints
        were written left some that are of another step.
        """
        saved = []
        for loop in self.loops.values():
            with suppress(ArtefactError):  # which `open` meets again
                saved.append(_saved(loop))
        furthest = max((facts.steps for facts in saved), default=0)
        if any(facts.steps < furthest and facts.ending is None for facts in saved):
            self.progress.say("the checkpoints are not of one step: all runs begin anew")
            for loop in self.loops.values():
                if loop.store is not None:
                    loop.store.remove()

    def _open(self, slot: int) -> None:
        loop = self.loops[slot]
        try:
            loop.open()
        except DeltatuneError as error:
            self._end(slot, error)
        else:
            if loop.done:
                self._end(slot, loop.result())

    def _end(self, slot: int, outcome: Outcome) -> None:
        number, loop = self.numbers.pop(slot), self.loops.pop(slot, None)
        if loop is not None:
            loop.log.close()
        if isinstance(outcome, DeltatuneError):
            self.progress.say(f"run {number} stopped: {outcome}")
        self.outcomes[number] = outcome
        SlotRun(self.delta, slot).eval()
        self.ended(number, slot, outcome)

    def _step(self, steps: int) -> None:
        """One step of every run that is under way."""
        if not self.delta.training:
            SlotRun(self.delta, 0).train()
        started = time.perf_counter()
        chosen = {slot: self._choose(loop) for slot, loop in self.loops.items()}
        before = {slot: loop.state.facts.tokens for slot, loop in self.loops.items()}
        losses = self.passes.gradients(self.loops, chosen)
        seconds = time.perf_counter() - started
        taken = {slot: self.loops[slot].state.facts.tokens - held for slot, held in before.items()}
        for slot, one in chosen.items():
            share = taken[slot] / sum(taken.values()) if any(taken.values()) else 1 / len(taken)
            self._finish(slot, one, losses[slot], seconds * share)
        self._settle()
        spent = len(self.outcomes) + sum(loop.fraction() for loop in self.loops.values())
        self.progress.step(
            steps,
            spent / len(self.jobs),
            sum(losses.values()) / len(losses),
            max(one.learning_rate for one in chosen.values()),
        )

    def _choose(self, loop: Loop) -> Chosen:
        loop.taker.run.set_step(loop.state.facts.forwards)
        loop.state.facts.forwards += 1
        return loop.taker.choose(loop.state, loop.factor, loop.fraction())

    def _finish(self, slot: int, chosen: Chosen, loss: float, seconds: float) -> None:
        loop = self.loops[slot]
        try:
            with loop.taker.explained(loop.state, chosen):
                if not math.isfinite(loss):
                    raise TrainingError(f"The loss is not finite ({loss})")
                taken = loop.taker.finish(loop.state, chosen, loss)
            loop.after(taken, seconds)
        except DeltatuneError as error:
            self._end(slot, error)

    def _settle(self) -> None:
        """Writes all checkpoints of a step, one right after the other, before any run ends."""
        errors: dict[int, DeltatuneError] = {}
        for slot, loop in self.loops.items():
            try:
                loop.settle()
            except DeltatuneError as error:
                errors[slot] = error
        for slot, loop in list(self.loops.items()):
            if slot in errors:
                self._end(slot, errors[slot])
            elif loop.done:
                self._end(slot, loop.result())


def _visits(jobs: Sequence[Job]) -> float:
    """How often a row is seen, in the mean, where jobs share rows."""
    rows = {id(job.rows): len(job.rows) for job in jobs}
    seen = sum(epochs(job.budget, len(job.rows), job.settings) * len(job.rows) for job in jobs)
    return seen / max(sum(rows.values()), 1)


def _loop(run: SlotRun, job: Job, passes: SharedPasses) -> Loop:
    taker, state, warmup = begin(
        run, job.rows, passes.collate, job.settings, job.budget, passes.accelerator
    )
    validate = job.validate and functools.partial(_routed, run, job.validate)
    return Loop.of(
        taker, state, warmup, job.budget, validate, job.metric, job.folder, SilentProgress()
    )


def _saved(loop: Loop) -> Facts:
    """How far a run is by its checkpoint. Raises ArtefactError as `Loop.open` does."""
    found = None if loop.store is None else loop.store.read(loop.identity)
    return Facts() if found is None else Facts.read(found.record["facts"])


def _routed(run: SlotRun, validate: Validate) -> Mapping[str, float]:
    with run.delta.route([run.slot]):
        return validate()
