"""The training loop: `fit`.

Short and explicit: take a step; now and then evaluate and write a checkpoint. All that changes on
the way is in one `RunState`, so that several runs over one base will be several of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.training.batch import describe_tensors, digest_rows
from deltatune.training.budget import Budget, Tokens
from deltatune.training.checkpoint import Checkpoint, Store, made_with
from deltatune.training.log import Log
from deltatune.training.memory import peak_device_memory, peak_memory, reset_peaks
from deltatune.training.mixture import order_of
from deltatune.training.optim import build_optimiser, schedule_factor, warmup_fraction
from deltatune.training.packing import Packing
from deltatune.training.parts import check_lengths
from deltatune.training.progress import Progress, SilentProgress
from deltatune.training.random_state import isolated_random_state
from deltatune.training.settings import Settings
from deltatune.training.state import Ending, Evaluation, Result, RunState
from deltatune.training.step import Collate, StepTaker, Taken
from deltatune.training.surveying import survey
from deltatune.training.trainable import Trainable
from deltatune.training.trunk_cache import TrunkCache

__all__ = ["Loop", "Validate", "begin", "epochs", "fit", "serving"]

Validate = Callable[[], Mapping[str, float]]


def fit(
    run: Trainable,
    rows: Sequence[Any],
    collate: Collate,
    *,
    settings: Settings,
    budget: Budget,
    validate: Validate | None = None,
    metric: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
) -> Result:
    """Trains `run` on `rows` until the budget is spent, or the metric no longer grows.

    With a folder the run writes `log.jsonl` and, every `settings.checkpoint_every` steps, a
    checkpoint; called again with the same arguments it goes on from there, and ends with the same
    bits (fp32 on the CPU with the same libraries and number of threads; not for a budget in
    seconds). A run that is done is not run again: its tensors and its result are read. The device
    is that of accelerate. The global random state is given back as it was.

    Args:
        run: what is trained. It is moved to the device and left in evaluation mode.
        rows: the training data, in any form that `collate` takes; a `Mixture` of several tasks is
            drawn by temperature, and the log names the tasks of every step.
        collate: rows to a batch of tensors, the keyword arguments of `run`.
        settings: how to train; the learning rate must be set.
        budget: how long.
        validate: scores of the run as it is, higher being better; called every
            `settings.evaluation_every` steps and at the end.
        metric: the score that decides which step was best; None: the first that `validate` gives.
        folder: of the run; None: nothing is written.
        progress: what shows the run; None: nothing is shown.
        trunk_cache: keeps what the blocks below the delta give, where that pays; the result is the
            same but for the order of sums, also where a run goes on.

    Returns:
        What was measured.

    Raises:
        UnsupportedError: a trunk cache is given, and what lies below the delta is no fixed
            function.
        ConfigurationError: settings, budget, rows and run do not fit each other, or the folder
            cannot be written; before any training.
        UnsupportedError: packing is on and the run cannot be packed; before any training.
        ArtefactError: the folder holds a damaged checkpoint or that of another run.
        TrainingError: the loss or a gradient is not finite, or the disk is full. The checkpoint
            before it stays whole, and the run keeps the tensors of the last good step.
    """
    progress = progress or SilentProgress()
    accelerator = Accelerator()
    with isolated_random_state(accelerator.device):
        taker, state, warmup = begin(run, rows, collate, settings, budget, accelerator)
        loop = Loop.of(taker, state, warmup, budget, validate, metric, folder, progress)
        try:
            progress.start(f"training for {budget}")
            loop.open()
            visits = epochs(budget, len(rows), settings)
            with serving(trunk_cache, run, settings, visits, progress):
                return loop.run_to_end()
        finally:
            progress.stop()
            run.eval()
            loop.log.close()


def begin(
    run: Trainable,
    rows: Sequence[Any],
    collate: Collate,
    settings: Settings,
    budget: Budget,
    accelerator: Accelerator,
) -> tuple[StepTaker, RunState, float]:
    """Checks that all fits and moves the run to its device; the last value is the warm-up."""
    if not rows:
        raise ConfigurationError("There are no rows to train on.")
    if accelerator.num_processes > 1:
        raise UnsupportedError(
            f"Training over {accelerator.num_processes} processes is not supported. Start one "
            "process, or one run in each."
        )
    if settings.tokens_per_pass is not None:
        check_lengths(
            rows, settings.tokens_per_pass, owner="The training data", setting="tokens_per_pass"
        )
    sampler = order_of(rows, settings)
    warmup = warmup_fraction(settings, budget, sampler.batches_per_epoch)
    # Before the optimiser, which must hold the parameters as they are on the device.
    cast(nn.Module, run).to(accelerator.device)
    packing = Packing.of(run, rows, collate, accelerator.device) if settings.packing else None
    state = RunState.begin(sampler, build_optimiser(run, settings), run.policies())
    return StepTaker(run, rows, collate, settings, accelerator, packing), state, warmup


@dataclass(frozen=True, eq=False)
class Loop:
    """One run under way. All that changes is in `state` and in the run's tensors."""

    taker: StepTaker
    state: RunState
    warmup: float
    budget: Budget
    validate: Validate | None
    metric: str | None
    identity: Mapping[str, Any]
    log: Log
    store: Store | None
    progress: Progress

    @classmethod
    def of(
        cls,
        taker: StepTaker,
        state: RunState,
        warmup: float,
        budget: Budget,
        validate: Validate | None,
        metric: str | None,
        folder: Path | None,
        progress: Progress,
    ) -> Loop:
        """A run before its first step. Raises ConfigurationError if the folder cannot be used."""
        settings = taker.settings
        if settings.patience is not None and validate is None:
            raise ConfigurationError(
                "patience needs a validation. Give `validate`, or no patience."
            )
        store = None if folder is None or settings.checkpoint_every is None else Store(folder)
        identity = {
            **_identity(taker, budget, metric, validate is not None, store is not None),
            **state.sampler.identity,
        }
        log = Log(folder)
        return cls(taker, state, warmup, budget, validate, metric, identity, log, store, progress)

    def open(self) -> None:
        """Goes to the last checkpoint, or writes a first one before any training."""
        reset_peaks()
        if self.store is not None:
            self.store.clear_unfinished()
            found = self.store.read(self.identity)
            if found is not None:
                self._resume(found)
                return
        self.log.cut(0)
        self.log.write("start", **self.identity)
        survey(
            self.taker.run,
            self.taker.rows,
            self.taker.collate,
            precision=self.taker.settings.precision,
            order=self.state.sampler.first,
            policies=self.state.policies,
            progress=self.progress,
        )
        if self.fraction() >= 1.0:  # a budget of nothing
            self._evaluate()
            self._finish("budget")
        else:
            self._save()

    def run_to_end(self) -> Result:
        """Trains until the budget is spent or patience is at its end."""
        if not self.done:
            self._train()
        while not self.done:
            started = time.perf_counter()
            taken = self.taker.take(self.state, self.factor, self.fraction())
            self.after(taken, time.perf_counter() - started)
            self.settle()
        return self.result()

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return self.state.facts.ending is not None

    @property
    def factor(self) -> float:
        """The learning rate of the next step, as a fraction of the highest."""
        return schedule_factor(self.taker.settings.schedule, self.fraction(), self.warmup)

    def after(self, taken: Taken, seconds: float) -> None:
        """What follows a step: the log and, where it is due, evaluation. Then comes `settle`."""
        settings, facts = self.taker.settings, self.state.facts
        facts.seconds += seconds
        self._note(taken)
        if facts.steps == settings.base_dropout_steps:
            self._train()
        if self.fraction() >= 1.0 or _due(facts.steps, settings.evaluation_every):
            self._evaluate()

    def settle(self) -> None:
        """The end or a checkpoint, where they are due after a step."""
        settings, facts = self.taker.settings, self.state.facts
        if self.fraction() >= 1.0:
            self._finish("budget")
        elif settings.patience is not None and facts.stale >= settings.patience:
            self._finish("patience")
        elif _due(facts.steps, settings.checkpoint_every):
            self._save()

    def fraction(self) -> float:
        """How much of the budget is spent."""
        return self.budget.fraction(self.state.facts.spent, self.state.sampler.batches_per_epoch)

    def _note(self, taken: Taken) -> None:
        facts = self.state.facts
        if isinstance(self.budget, Tokens) and facts.tokens == 0:
            raise ConfigurationError(
                "There are no tokens to count: the batches have neither attention_mask nor "
                "input_ids. Give the budget in steps, epochs or seconds."
            )
        spent = {"step": facts.steps, "tokens": facts.tokens, "seconds": facts.seconds}
        self.log.write("step", **spent, **asdict(taken), **self.state.sampler.about)
        self.progress.step(facts.steps, self.fraction(), taken.loss, taken.learning_rate)

    def _train(self) -> None:
        """Puts the run into training, with the base's dropout as long as it lasts."""
        self.taker.run.base_dropout = self.taker.settings.drops_out(self.state.facts.steps)
        self.taker.run.train()

    def _evaluate(self) -> None:
        """Scores the run, and remembers its tensors if they are the best so far."""
        if self.validate is None:
            return
        run, facts = self.taker.run, self.state.facts
        run.eval()
        found = self.validate()
        self._train()
        scores = {name: float(s) if math.isfinite(s) else None for name, s in found.items()}
        metric = self.metric or next(iter(scores), "")
        if metric not in scores:
            raise UnknownNameError("score of the validation", metric, scores)
        facts.history.append(Evaluation(facts.steps, facts.seconds, scores))
        score = scores[metric]
        facts.stale += 1
        if score is not None and (facts.best_score is None or score > facts.best_score):
            facts.best_step, facts.best_score, facts.stale = facts.steps, score, 0
            if self.taker.settings.keep_best:
                state = run.trainable_state()
                self.state.best = {n: t.detach().to("cpu", copy=True) for n, t in state.items()}
        self.log.write("evaluation", step=facts.steps, seconds=facts.seconds, scores=scores)
        self.progress.evaluated(facts.steps, scores)

    def _finish(self, ending: Ending) -> None:
        """Goes back to the best tensors, and writes what a finished run leaves."""
        facts = self.state.facts
        facts.ending = ending
        if self.state.best:
            self.taker.run.load_trainable_state(self.state.best)
        # Nothing goes on from here: a checkpoint of the end holds the trained tensors alone.
        self.state.forget()
        self._measure()
        self.log.write(
            "end",
            ending=ending,
            step=facts.steps,
            best_step=facts.best_step,
            kept_step=self.result().kept_step,
            seconds=facts.seconds,
            peak_memory=facts.peak_memory,
            peak_device_memory=facts.peak_device_memory,
        )
        self._save()

    def _save(self) -> None:
        """Writes a checkpoint, which counts on the lines of the log so far."""
        if self.store is None:
            return
        self._measure()
        self.log.flush()
        trained = {f"trained/{n}": t for n, t in self.taker.run.trainable_state().items()}
        record = {**self.state.record(), "lines": self.log.lines, "made_with": made_with()}
        tensors = {**trained, **self.state.tensors()}
        self.store.write(Checkpoint(self.identity, record, tensors))

    def _resume(self, found: Checkpoint) -> None:
        """Puts everything back to where the checkpoint was written."""
        trained = {
            name.removeprefix("trained/"): tensor
            for name, tensor in found.tensors.items()
            if name.startswith("trained/")
        }
        self.taker.run.load_trainable_state(trained)
        self.state.restore(found.record, found.tensors)
        self.log.cut(found.record["lines"])
        done = self.state.facts.ending is not None
        self.progress.say(f"{'done' if done else 'goes on'} after step {self.state.facts.steps}")
        if found.record["made_with"] != made_with():
            self.progress.say(
                f"The checkpoint was made with {found.record['made_with']}, this is "
                f"{made_with()}: the result may differ in its last bits from that of an "
                "uninterrupted run."
            )

    def _measure(self) -> None:
        facts = self.state.facts
        facts.peak_memory = max(facts.peak_memory, peak_memory())
        facts.peak_device_memory = max(facts.peak_device_memory, peak_device_memory())

    def result(self) -> Result:
        """What was measured."""
        sampler, facts = self.state.sampler, self.state.facts
        kept = facts.best_step if self.taker.settings.keep_best else None
        return Result(
            steps=facts.steps,
            epochs=sampler.epoch + sampler.index / sampler.batches_per_epoch,
            rows=facts.rows,
            tokens=facts.tokens,
            seconds=facts.seconds,
            losses=tuple(facts.losses),
            history=tuple(facts.history),
            best_step=facts.best_step,
            best_score=facts.best_score,
            kept_step=facts.steps if kept is None else kept,
            peak_memory=facts.peak_memory,
            peak_device_memory=facts.peak_device_memory,
            ending=cast(Ending, facts.ending),
        )


def serving(
    cache: TrunkCache | None, run: Trainable, settings: Settings, visits: float, progress: Progress
) -> AbstractContextManager[None]:
    """Within it a run's model reads what the cache keeps, if there is one; see `TrunkCache`."""
    return nullcontext() if cache is None else cache.serving(run, settings, visits, progress)


def epochs(budget: Budget, rows: int, settings: Settings) -> float:
    """How often a budget sees each of so many rows; infinite where it does not tell."""
    batches = -(-rows // settings.rows_per_step)
    total = budget.total_steps(batches) if batches else 0
    return math.inf if total is None else total / max(batches, 1)


def _identity(
    taker: StepTaker, budget: Budget, metric: str | None, validated: bool, kept: bool
) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint, as JSON values."""
    settings = taker.settings.model_dump(mode="json")
    return {
        **{f"settings.{name}": value for name, value in settings.items()},
        "budget": str(budget),
        "metric": metric,
        "validated": validated,
        "rows": digest_rows(taker.rows) if kept else f"{len(taker.rows)} rows",
        "trained": describe_tensors(taker.run.trainable_state()),
    }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
