"""`deltatune study query`: SQL over the cells of a study."""

from __future__ import annotations

import csv
import sys
from typing import Annotated, Any

import typer

from deltatune.cli.options import Json, Study
from deltatune.cli.output import print_json, show
from deltatune.core.errors import ConfigurationError

__all__ = ["query"]


def query(
    folder: Study,
    sql: Annotated[str, typer.Argument(help="One SELECT over the tables cells and curve.")],
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Ask a study in SQL, over its cells and curves.

    'select method, avg(score) from cells group by method'; 'describe cells' shows the columns. A
    query changes nothing and sees no other file.
    """
    if as_json and as_csv:
        raise ConfigurationError("Give --json or --csv, not both.")
    from deltatune.study.query import query as ask
    from deltatune.study.store import open_study

    answer = ask(open_study(folder), sql)
    if as_json:
        print_json({"columns": answer.columns, "rows": answer.rows})
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([answer.columns, *answer.rows])
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in answer.columns:
            table.add_column(Text(name))
        for row in answer.rows:
            table.add_row(*(Text(_shown(value)) for value in row))
        show(table)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
