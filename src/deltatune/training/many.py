"""Many runs over one frozen base: `fit_many`.

Every run has a slot of one delta, its own data, order, optimiser, schedule, early stop, log and
checkpoint. In each step the rows of all runs are sorted by length and cut into parts by a budget of
tokens, whatever run they belong to, so that one pass of the base serves them all; every row counts
by the items of its own run, and reaches its own slot alone. A run ends as it would alone, up to the
order of sums.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, TrainingError
from deltatune.core.run import SlotRun
from deltatune.training.batch import count_tokens, loss_items, row_length
from deltatune.training.budget import Budget
from deltatune.training.loop import Loop, Validate, begin
from deltatune.training.losses import inputs_without_loss, row_losses
from deltatune.training.parts import check_lengths, cut
from deltatune.training.progress import Progress, SilentProgress
from deltatune.training.random_state import isolated_random_state
from deltatune.training.settings import Settings
from deltatune.training.state import Result
from deltatune.training.step import Chosen, Collate

__all__ = ["Job", "fit_many"]


@dataclass(frozen=True)
class Job:
    """One of the runs that share a base; see `fit` for what its fields are.

    Attributes:
        rows: the training data.
        settings: how to train. What concerns the base must be the same for all jobs: precision,
            packing, and no dropout of its own.
        budget: how long.
        validate: scores of the run, called while every row goes through its slot.
        metric: the score that decides which step was best.
        folder: of the run.
    """

    rows: Sequence[Any]
    settings: Settings
    budget: Budget
    validate: Validate | None = None
    metric: str | None = None
    folder: Path | None = None


def fit_many(
    delta: Delta,
    jobs: Sequence[Job],
    collate: Collate,
    *,
    tokens: int = 2048,
    progress: Progress | None = None,
) -> list[Result | TrainingError]:
    """Trains one slot of a delta for each job, all at once.

    Seconds are those of the steps that a run took part in, shared with the others. Where a run
    stops because a loss or gradient is not finite, the others go on.

    Args:
        delta: attached, with at least as many slots as there are jobs; job k trains slot k.
        jobs: what is trained.
        collate: rows of any of the jobs to a batch of tensors with labels.
        tokens: how many input tokens, with padding, one pass may have; the jobs' own
            `tokens_per_pass` has no place here.
        progress: what shows the runs.

    Returns:
        For each job what was measured, or the error that stopped it.

    Raises:
        ConfigurationError: jobs, slots and budget of tokens do not fit each other; see `fit` for
            the rest.
    """
    accelerator, progress = Accelerator(), progress or SilentProgress()
    _check(delta, jobs, tokens)
    runs = [SlotRun(delta, slot) for slot in range(len(jobs))]
    with isolated_random_state(accelerator.device):
        loops = [_loop(run, job, collate, accelerator) for run, job in zip(runs, jobs, strict=True)]
        try:
            progress.start(f"training {len(jobs)} runs")
            for loop in loops:
                loop.open()
            return _Together(delta, loops, collate, tokens, accelerator, progress).run()
        finally:
            progress.stop()
            runs[0].eval()
            for loop in loops:
                loop.log.close()


def _check(delta: Delta, jobs: Sequence[Job], tokens: int) -> None:
    """Raises ConfigurationError if the jobs cannot be run together."""
    if not jobs or len(jobs) > delta.slots:
        raise ConfigurationError(
            f"{len(jobs)} jobs for {delta.slots} slots. Attach with slots={max(len(jobs), 1)}."
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


def _loop(run: SlotRun, job: Job, collate: Collate, accelerator: Accelerator) -> Loop:
    taker, state, warmup = begin(run, job.rows, collate, job.settings, job.budget, accelerator)
    validate = job.validate and functools.partial(_routed, run, job.validate)
    return Loop.of(
        taker, state, warmup, job.budget, validate, job.metric, job.folder, SilentProgress()
    )


def _routed(run: SlotRun, validate: Validate) -> Mapping[str, float]:
    with run.delta.route([run.slot]):
        return validate()


@dataclass(frozen=True)
class _Together:
    """All runs under way."""

    delta: Delta
    loops: Sequence[Loop]
    collate: Collate
    tokens: int
    accelerator: Accelerator
    progress: Progress

    def run(self) -> list[Result | TrainingError]:
        """Steps until every run has ended."""
        failed: dict[int, TrainingError] = {}
        steps = 0
        while active := [k for k, one in enumerate(self.loops) if not one.done and k not in failed]:
            self.loops[active[0]].taker.run.train()
            started = time.perf_counter()
            chosen = {k: self._choose(k) for k in active}
            losses = self._gradients(chosen)
            seconds = time.perf_counter() - started
            for k in active:
                try:
                    self._finish(k, chosen[k], losses[k], seconds)
                except TrainingError as error:
                    failed[k] = error
                    self.progress.say(f"run {k} stopped: {error}")
            steps += 1
            spent = [1.0 if k in failed else loop.fraction() for k, loop in enumerate(self.loops)]
            self.progress.step(
                steps,
                sum(spent) / len(spent),
                sum(losses.values()) / len(losses),
                max(one.learning_rate for one in chosen.values()),
            )
        return [failed.get(k) or loop.result() for k, loop in enumerate(self.loops)]

    def _choose(self, k: int) -> Chosen:
        loop = self.loops[k]
        loop.taker.run.set_step(loop.state.facts.forwards)
        loop.state.facts.forwards += 1
        return loop.taker.choose(loop.state, loop.factor)

    def _finish(self, k: int, chosen: Chosen, loss: float, seconds: float) -> None:
        loop = self.loops[k]
        with loop.taker.explained(loop.state, chosen):
            if not math.isfinite(loss):
                raise TrainingError(f"The loss is not finite ({loss})")
            taken = loop.taker.finish(loop.state, chosen, loss)
        loop.after(taken, seconds)

    def _gradients(self, chosen: Mapping[int, Chosen]) -> dict[int, float]:
        """Adds to every slot the gradient of its run's mean loss; returns the losses."""
        device = self.accelerator.device
        parts = [(slots, self._batch(rows)) for slots, rows in self._parts(chosen)]
        items = dict.fromkeys(chosen, 0)
        for slots, batch in parts:
            for k, count in zip(slots, loss_items(batch["labels"]).tolist(), strict=True):
                items[k] += count
        losses = dict.fromkeys(chosen, 0.0)
        for slots, batch in parts:
            held = {name: value.to(device) for name, value in batch.items()}
            each = self._forward(slots, held)
            shares = torch.tensor([1 / max(items[k], 1) for k in slots], device=device)
            for k, value in zip(slots, (each.detach() * shares).tolist(), strict=True):
                losses[k] += value if items[k] else math.nan
            self.accelerator.backward((each * shares).sum())
        return losses

    def _forward(self, slots: Sequence[int], batch: Mapping[str, Tensor]) -> Tensor:
        model, taker = self.delta.model, self.loops[0].taker
        device, bf16 = self.accelerator.device, taker.settings.precision == "bf16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        with self.delta.route(slots), taker.packed(), autocast:
            logits = model(**inputs_without_loss(model, batch)).logits
        return row_losses(model, logits, batch["labels"])

    def _batch(self, rows: Sequence[tuple[int, Any]]) -> Mapping[str, Tensor]:
        """The rows as one batch; their tokens are counted by run."""
        batch = self.collate([row for _, row in rows])
        for place, (k, _) in enumerate(rows):
            one = {name: value[place : place + 1] for name, value in batch.items()}
            self.loops[k].state.facts.tokens += count_tokens(one)
        return batch

    def _parts(self, chosen: Mapping[int, Chosen]) -> list[tuple[list[int], list[tuple[int, Any]]]]:
        """The rows of all runs by length, in parts that keep to the budget, runs in order."""
        rows = [(k, self.loops[k].taker.rows[row]) for k, one in chosen.items() for row in one.rows]
        lengths = [row_length(row) for _, row in rows]
        packed = self.loops[0].taker.settings.packing
        parts = [
            [rows[place] for place in sorted(part)]
            for part in cut(lengths, self.tokens, packed=packed)
        ]
        return [([k for k, _ in part], part) for part in parts]
