"""`deltatune train`: one delta on one task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.cli.options import (
    At,
    Backbone,
    BatchSize,
    Budget,
    Config,
    Data,
    DryRun,
    Json,
    Method,
    Protocol,
    Rows,
    Set,
    Steps,
    Trunk,
    budget_of,
    gather,
    nested,
    requested,
    trunk_cache_of,
)
from deltatune.cli.output import print_json, resumable, show

__all__ = ["train"]


def train(
    context: typer.Context,
    backbone: Backbone = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task id, or a file of your own; several: 'a + b'.", metavar="TASK"),
    ] = None,
    method: Method = None,
    at: At = None,
    steps: Steps = None,
    budget: Budget = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest rate; else the method's preset.")
    ] = None,
    batch_size: BatchSize = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    trunk_cache: Trunk = None,
    protocol: Protocol = None,
    data: Data = None,
    train_rows: Rows = None,
    validation_rows: Rows = None,
    test_rows: Rows = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the delta, its log and its checkpoints.")
    ] = None,
    config: Config = None,
    changes: Set = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train a delta on a task, score it, and save it."""
    values = gather(config, changes, requested(context), needed=("backbone", "task", "method"))
    cache = trunk_cache_of(values)
    request = request_of(values)

    from deltatune import api
    from deltatune.training.progress import SilentProgress, choose_progress

    if dry_run:
        from deltatune.cli.plan import plan_data, summary

        found = api.plan(request["backbone"], request["method"], request.get("at"))
        if as_json:
            settings = request["settings"].model_dump(mode="json")
            print_json({"request": {**request, "settings": settings}, "plan": plan_data(found)})
        else:
            show(*summary(found)[1:], f"budget    {request['budget']}")
        return
    progress = SilentProgress() if as_json else choose_progress()
    with resumable():
        result = api.train(**request, progress=progress, trunk_cache=cache)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        show(*describe(result))


def request_of(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `api.train` from the values of the command."""
    from deltatune.training.settings import Settings

    settings = nested(
        values,
        "settings",
        learning_rate=values.pop("learning_rate", None),
        per_device_batch_size=values.pop("batch_size", None),
    )
    rows = {key: values.pop(key, None) for key in ("train_rows", "validation_rows", "test_rows")}
    request = {
        "budget": budget_of(values),
        "settings": Settings(**settings),
        "options": nested(values, "options", **rows),
        "folder": values.pop("out", None),
    }
    return {**values, **request}


def describe(result: Any) -> list[str]:
    """Returns what there is to say of a result, a line each."""
    scores = ", ".join(f"{name} {100 * score:.2f}" for name, score in result.scores.items())
    kept = ", ".join(f"{name} {100 * score:.2f}" for name, score in result.validation.items())
    lines = [
        f"test        {scores}" + (f" ({result.status})" if result.status != "complete" else ""),
        f"validation  {kept}",
        f"trained     {result.trainable:,} of {result.base:,} ({100 * result.ratio:.3g}%)",
        f"took        {result.steps} steps, {result.seconds:.1f} s of training",
    ]
    lines += [f"note        {note}" for note in result.notes]
    if result.majority is not None:
        lines.insert(1, f"commonest label alone {100 * result.majority:.2f}")
    if result.artefact is not None:
        lines.append(f"saved       {result.artefact}")
    return lines
