"""`deltatune methods`: what there is to tune with."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from deltatune.cli.options import Json
from deltatune.cli.output import print_json, show

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or describe one."""
    from deltatune.core.method import METHODS

    if name is not None:
        method = METHODS[name]
        found = {**_describe(name, method), "fields": _fields(method)}
        if as_json:
            print_json(found)
        else:
            _show_one(found)
        return
    all_of_them = [_describe(known, METHODS[known]) for known in METHODS]
    if as_json:
        print_json(all_of_them)
        return
    from rich.table import Table

    table = Table("method", "category", "face", "sits at", "what it does", box=None, pad_edge=False)
    for found in all_of_them:
        table.add_row(*(found[key] for key in ("name", "category", "face", "at", "summary")))
    show(table)


def _describe(name: str, method: type[Any]) -> dict[str, Any]:
    import inspect

    return {
        "name": name,
        "category": method.category,
        "face": method.face,
        "at": method.default_at,
        "learning_rate": method.learning_rate,
        "summary": (inspect.getdoc(method) or "").partition("\n")[0],
    }


def _fields(method: type[Any]) -> dict[str, dict[str, Any]]:
    return {
        field.name: {"type": str(field.type), "default": field.default}
        for field in dataclasses.fields(method)
    }


def _show_one(found: dict[str, Any]) -> None:
    show(f"{found['name']}: {found['summary']}")
    show(f"category {found['category']}, face {found['face']}, sits at {found['at']!r}")
    show(f"learning rate to start from {found['learning_rate']:g}")
    for field, about in found["fields"].items():
        show(f"  {field}: {about['type']} = {about['default']!r}")
