"""`deltatune eval`: a saved delta on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.options import (
    Backbone,
    Config,
    Data,
    Json,
    Protocol,
    Rows,
    Set,
    gather,
    nested,
    requested,
)
from deltatune.cli.output import print_json, show

__all__ = ["evaluate"]


def evaluate(
    context: typer.Context,
    delta: Annotated[Path, typer.Argument(help="Folder of a saved delta.")],
    task: Annotated[
        str | None, typer.Option(help="Task id; else the one it was trained on.", metavar="TASK")
    ] = None,
    backbone: Backbone = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test.", metavar="NAME")
    ] = None,
    protocol: Protocol = None,
    data: Data = None,
    rows: Rows = None,
    config: Config = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Load a saved delta onto its backbone and score it.

    A backbone that is not the one it was trained on is refused.
    """
    values = gather(config, changes, requested(context, but="delta"))
    limit = {f"{values.get('split', 'test')}_rows": values.pop("rows", None)}
    values["options"] = nested(values, "options", **limit)

    from deltatune import api

    found = api.evaluate(delta, **values)
    if as_json:
        print_json(found)
        return
    scores = ", ".join(f"{name} {100 * score:.2f}" for name, score in found["scores"].items())
    status = "" if found["status"] == "complete" else f" ({found['status']})"
    show(f"{found['task']}, {found['split']}, {found['rows']} rows: {scores}{status}")
    show(*(f"note  {note}" for note in found["notes"]))
