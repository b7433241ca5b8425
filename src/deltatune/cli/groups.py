"""Commands that have commands of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import typer

__all__ = ["group"]


def group(help: str, commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    """Returns one command with others below it."""
    app = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
    for name, command in commands.items():
        # Given as such, the first line is not cut to the width of a terminal.
        app.command(name, short_help=(command.__doc__ or "").partition("\n")[0])(command)
    return app
