"""A run in a process of its own, which may kill itself, without a chance to clean up."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from tests.training.standin import Row, StandIn, accuracy, collate, make_rows, quick

from deltatune.core.errors import DeltatuneError
from deltatune.training import Mixture, Result, Steps, fit
from deltatune.training import checkpoint as checkpoints
from deltatune.training import log as logs

STEPS = 14


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nth(count: int, usual: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """`usual`, but the call number `count` from 0 is `instead`."""
    calls = iter(range(1_000_000))
    return lambda *args, **kwargs: (instead if next(calls) == count else usual)(*args, **kwargs)


def _arm(moment: str, count: int) -> None:
    """Makes the process die in the middle of its write number `count`, from 0."""
    save, replace, write = checkpoints.save_file, os.replace, logs.Log.write

    def torn(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        _die()

    def moved(source: Path, target: Path) -> None:
        replace(source, target)
        _die()

    def half_a_line(self: Any, event: str, **fields: Any) -> None:
        self._file.write(b'{"event": "st')
        _die()

    if moment == "torn":
        checkpoints.save_file = _nth(count, save, torn)
    elif moment == "written":
        os.replace = _nth(count, replace, lambda *_: _die())
    elif moment == "moved":
        os.replace = _nth(count, replace, moved)
    elif moment == "line":
        usual = _nth(count, write, half_a_line)
        logs.Log.write = lambda self, *args, **kwargs: usual(self, *args, **kwargs)  # type: ignore[method-assign,assignment]


def train(
    folder: Path,
    *,
    kill_at: int | None = None,
    moment: str | None = None,
    count: int = 0,
    width: int = 8,
    every: int = 3,
    steps: int = STEPS,
    ready: Event | None = None,
    largest_file: int | None = None,
    mixed: bool | None = None,
) -> Result:
    """Trains the stand-in, in parts, with evaluations whose scores go up and down.

    On the rows of two tasks where `mixed` is given, which says how batches are drawn.
    """
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    if moment is not None:
        _arm(moment, count)
    run, rows = StandIn(kill_at, width), make_rows(22)
    trained: Sequence[Row] = rows
    if mixed is not None:
        trained = Mixture({"many": rows[:17], "few": rows[17:]}, temperature=2.0, mixed=mixed)
    settings = quick(
        accumulation=2,
        per_device_batch_size=3,
        evaluation_every=4,
        checkpoint_every=every,
        length_grouped=not mixed,
        schedule="cosine",
        warmup_steps=3,
    )
    if ready is not None:
        ready.set()
    return fit(
        run,
        trained,
        collate,
        settings=settings,
        budget=Steps(steps),
        validate=lambda: {"accuracy": accuracy(run, rows[:7])},
        folder=folder,
    )


def train_into(answers: SimpleQueue[str], folder: Path, **options: Any) -> None:
    """Trains, and answers with the error it meets."""
    try:
        train(folder, **options)
    except DeltatuneError as error:
        answers.put(f"{type(error).__name__}: {error}")
    else:
        answers.put("done")
