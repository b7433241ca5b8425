"""`deltatune study performance` and the other experiments: a command for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from deltatune.cli.compare import fields_of
from deltatune.cli.options import (
    At,
    Backbone,
    BatchSize,
    Budget,
    Config,
    Data,
    DryRun,
    Extend,
    Methods,
    Out,
    Protocol,
    Rates,
    Rows,
    Seeds,
    Set,
    Slots,
    Steps,
    Tasks,
    Trunk,
    gather,
    requested,
    trunk_cache_of,
)

if TYPE_CHECKING:
    from deltatune.study.experiment import Experiment

__all__ = ["command_of"]

# An option of a command -> the field of a comparison that it gives.
_FIELDS = {"backbone": "backbones", "tasks": "tasks", "methods": "methods"}


def command_of(experiment: Experiment) -> Callable[..., None]:
    """The command of an experiment. All of them take the same options."""

    def command(
        context: typer.Context,
        backbone: Backbone = None,
        tasks: Tasks = None,
        methods: Methods = None,
        at: At = None,
        steps: Steps = None,
        budget: Budget = None,
        seeds: Seeds = None,
        learning_rates: Rates = None,
        extend: Extend = None,
        batch_size: BatchSize = None,
        together: Slots = None,
        trunk_cache: Trunk = None,
        protocol: Protocol = None,
        data: Data = None,
        train_rows: Rows = None,
        validation_rows: Rows = None,
        test_rows: Rows = None,
        out: Out = None,
        config: Config = None,
        changes: Set = None,
        dry_run: DryRun = False,
    ) -> None:
        needed = [name for name, field in _FIELDS.items() if field not in experiment.defaults]
        values = gather(config, changes, requested(context), needed=(*needed, "out"))
        folder, source = Path(values.pop("out")), values.pop("data", None)
        slots, cache = int(values.pop("together", None) or 1), trunk_cache_of(values)
        study = experiment.study(**fields_of(values))
        if dry_run:
            _show_plan(study)
            return
        _run(study, folder, source, slots, cache)

    command.__doc__ = f"{experiment.shows[0].upper()}{experiment.shows[1:]} ({experiment.paper})."
    return command
