"""Commands that have commands of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import typer

__all__ = ["group"]


def group(
    help: str,
    commands: Mapping[str, Callable[..., None]],
    alone: Callable[..., None] | None = None,
) -> typer.Typer:
    """Returns one command with others below it.

    Args:
        help: what they are for.
        commands: name -> what it does.
        alone: what the command does, and the options it has, without one of them; it is called
            before them too. None: the help is shown.
    """
    app = typer.Typer(help=help, no_args_is_help=alone is None, rich_markup_mode=None)
    if alone is not None:
        app.callback(invoke_without_command=True, help=help)(alone)
    for name, command in commands.items():
        # Given as such, the first line is not cut to the width of a terminal.
        app.command(name, short_help=(command.__doc__ or "").partition("\n")[0])(command)
    return app
