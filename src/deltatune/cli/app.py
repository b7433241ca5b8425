"""The list of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from deltatune import __version__
from deltatune.cli import hub, study, tasks
from deltatune.cli.compare import compare
from deltatune.cli.doctor import doctor
from deltatune.cli.evaluate import evaluate
from deltatune.cli.export import export
from deltatune.cli.methods import methods
from deltatune.cli.plan import plan
from deltatune.cli.train import train

__all__ = ["COMMANDS", "GROUPS", "build"]

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "compare": compare,
    "plan": plan,
    "methods": methods,
    "export": export,
    "doctor": doctor,
}
# Commands that have commands of their own.
GROUPS: dict[str, Callable[[], typer.Typer]] = {
    "tasks": tasks.build,
    "study": study.build,
    "hub": hub.build,
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deltatune {__version__}")
        raise typer.Exit


def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Train, compare and keep small deltas of frozen language models."""


def build() -> typer.Typer:
    """Returns the command line."""
    app = typer.Typer(
        name="deltatune",
        callback=_start,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in COMMANDS.items():
        app.command(name)(command)
    for name, group in GROUPS.items():
        app.add_typer(group(), name=name)
    return app
