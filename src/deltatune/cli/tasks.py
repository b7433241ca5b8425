"""`deltatune tasks`: what there is to train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import typer

from deltatune.cli.groups import group
from deltatune.cli.options import Data, Json, Protocol
from deltatune.cli.output import print_json, show
from deltatune.core.errors import ConfigurationError

__all__ = ["COMMANDS", "build"]

_SHOWN_LABELS = 8
Name: TypeAlias = Annotated[str, typer.Argument(help="Of the task.", metavar="NAME")]


def list_all(context: typer.Context, as_json: Json = False) -> None:
    """List the tasks."""
    from deltatune.tasks import find_task, known_tasks

    if context.invoked_subcommand is not None:
        if as_json:
            raise ConfigurationError(
                f"Put --json behind {context.invoked_subcommand!r}, whose answer it is to shape."
            )
        return
    records = [find_task(known) for known in known_tasks()]
    if as_json:
        print_json([_describe(record) for record in records])
        return
    from rich.table import Table

    table = Table("task", "kind", "metric", "encoder", "category", box=None, pad_edge=False)
    for record in records:
        about = _describe(record)
        keys = ("name", "kind", "metric", "encoder", "category")
        table.add_row(*("yes" if about[k] is True else about[k] or "" for k in keys))
    show(table)


def show_one(
    name: Name, data: Data = None, protocol: Protocol = None, as_json: Json = False
) -> None:
    """Read a task and say what it is, with one of its rows."""
    record, splits = _load(name, data, protocol)
    about = _inspect(record, splits, protocol, rows=1)
    if as_json:
        print_json(about)
    else:
        show(*_said(about))


def check(
    name: Name,
    backbone: Annotated[
        str, typer.Option(help="Whose tokenizer measures the rows.", metavar="NAME")
    ] = "t5-mini",
    rows: Annotated[int, typer.Option(help="How many rows to show.", min=1)] = 3,
    data: Data = None,
    protocol: Protocol = None,
    as_json: Json = False,
) -> None:
    """Show rows of a task and measure all: lengths, what is cut, labels."""
    from deltatune.backbones.load import load_backbone
    from deltatune.execution.checking import check_rows

    record, splits = _load(name, data, protocol)
    about = _inspect(record, splits, protocol, rows)
    found = check_rows(record, splits, load_backbone(backbone))
    if as_json:
        print_json({**about, "backbone": backbone, "check": found})
    else:
        show(*_said(about), *_measured(found, backbone))


COMMANDS: dict[str, Callable[..., None]] = {"show": show_one, "check": check}


def build() -> typer.Typer:
    """Returns the commands of `deltatune tasks`."""
    return group("List the tasks, or read one of them.", COMMANDS, alone=list_all)


def _load(name: str, data: str | None, protocol: Any) -> tuple[Any, Any]:
    from deltatune.tasks import find_task

    record = find_task(name)
    return record, record.load(data, protocol or "clean")


def _describe(record: Any) -> dict[str, Any]:
    return {
        "name": record.name,
        "version": record.version,
        "kind": record.kind,
        "metric": record.metric,
        "category": record.provenance.category,
        "labels": list(record.labels),
        "encoder": record.has_head,
        "notes": list(record.notes),
    }


def _inspect(record: Any, splits: Any, protocol: Any, rows: int) -> dict[str, Any]:
    shown = splits.train or splits.test
    return {
        **_describe(record),
        "origin": splits.origin,
        "status": splits.status,
        "protocol": protocol or "clean",
        "rows": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
        "removed": dict(splits.removed),
        "notes": list(splits.notes),
        "shown": [{"source": row.source, "targets": list(row.targets)} for row in shown[:rows]],
    }


def _said(about: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{part} {count}" for part, count in about["rows"].items())
    lines = [
        f"{about['name']} (version {about['version']}): {about['kind']}, {about['metric']}",
        f"category  {about['category']}",
        f"rows      {counts} (protocol {about['protocol']})",
        f"origin    {about['origin']} ({about['status']})",
        *(f"note      {note}" for note in about["notes"]),
    ]
    if about["labels"]:
        lines.append(f"labels    {', '.join(about['labels'])}")
    for row in about["shown"]:
        lines += [f"source    {row['source']}", f"target    {' | '.join(row['targets'])}"]
    return lines


def _measured(check: dict[str, Any], backbone: str) -> list[str]:
    limits = check["limits"]
    lines = [f"limits    source {limits['source']}, target {limits['target']} tokens ({backbone})"]
    for part, found in check["splits"].items():
        lengths = "; ".join(
            f"{what} " + ", ".join(f"{name} {value:g}" for name, value in found[what].items())
            for what in ("source", "target")
        )
        lines.append(f"{part:<11}{found['rows']} rows: {lengths}; {100 * found['cut']:.1f}% cut")
        ranked = sorted(found["labels"].items(), key=lambda share: -share[1])
        shares = [f"{label} {100 * share:.1f}%" for label, share in ranked[:_SHOWN_LABELS]]
        more = [f"{len(ranked) - _SHOWN_LABELS} more"] if len(ranked) > _SHOWN_LABELS else []
        lines += [f"{'':<11}{', '.join(shares + more)}"] if shares else []
    if check["majority"] is not None:
        lines.append(f"commonest label alone {100 * check['majority']:.2f}")
    return lines
