"""`deltatune study export`: what a study found, for other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.options import Study
from deltatune.cli.output import show
from deltatune.core.errors import ConfigurationError

__all__ = ["export"]


def export(
    folder: Study,
    form: Annotated[
        str,
        typer.Option("--format", help="json, parquet, csv, latex or markdown.", metavar="NAME"),
    ],
    table: Annotated[
        str | None,
        typer.Option(help="One table of the report, by its title; csv, latex, markdown."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; else it is printed.", metavar="FILE")
    ] = None,
) -> None:
    """Write the cells or the tables for other programs.

    All cells as flat rows: json, parquet, csv. The table of a comparison, or all tables of another
    study's report: latex, markdown.
    """
    from deltatune.study import export as exports
    from deltatune.study.store import open_study

    store = open_study(folder)
    if out is not None:
        show(f"written    {exports.write_export(store, form, out, table)}")
        return
    if form == "parquet":
        raise ConfigurationError("Parquet is not text. Give --out FILE.")
    sys.stdout.write(exports.export(store, form, table).decode())
