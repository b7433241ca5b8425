"""`deltatune study`: the experiments of the paper, and what can be done with a study's folder."""

from __future__ import annotations

from collections.abc import Callable

import typer

from deltatune.cli.groups import group
from deltatune.cli.study.experiments import EXPERIMENTS, command_of
from deltatune.cli.study.export import export
from deltatune.cli.study.query import query
from deltatune.cli.study.report import report
from deltatune.cli.study.run import run
from deltatune.cli.study.status import status
from deltatune.cli.study.watch import watch

__all__ = ["COMMANDS", "build"]

COMMANDS: dict[str, Callable[..., None]] = {
    **{name: command_of(name) for name in EXPERIMENTS},
    "run": run,
    "status": status,
    "watch": watch,
    "report": report,
    "query": query,
    "export": export,
}


def build() -> typer.Typer:
    """Returns the commands of `deltatune study`."""
    return group("Run an experiment of the paper, or look into the folder of a study.", COMMANDS)
