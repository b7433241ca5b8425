"""`deltatune tasks`: what there is to train on."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltatune.cli.options import Data, Json, Protocol
from deltatune.cli.output import print_json, show

__all__ = ["tasks"]


def tasks(
    name: Annotated[str | None, typer.Argument(help="One task, in full.")] = None,
    data: Data = None,
    protocol: Protocol = None,
    as_json: Json = False,
) -> None:
    """List the tasks, or read one and show an example."""
    from deltatune.tasks import find_task, known_tasks

    if name is not None:
        _show_one(_inspect(name, data, protocol or "clean"), as_json)
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


def _inspect(name: str, data: str | None, protocol: Any) -> dict[str, Any]:
    from deltatune.tasks import find_task

    record = find_task(name)
    splits = record.load(data, protocol)
    first = splits.train[0] if splits.train else None
    return {
        **_describe(record),
        "origin": splits.origin,
        "status": splits.status,
        "protocol": protocol,
        "rows": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
        "removed": dict(splits.removed),
        "notes": list(splits.notes),
        "source": first and first.source,
        "targets": first and list(first.targets),
    }


def _show_one(about: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(about)
        return
    counts = ", ".join(f"{part} {count}" for part, count in about["rows"].items())
    show(
        f"{about['name']} (version {about['version']}): {about['kind']}, {about['metric']}",
        f"category  {about['category']}",
        f"rows      {counts} (protocol {about['protocol']})",
        f"origin    {about['origin']} ({about['status']})",
    )
    show(*(f"note      {note}" for note in about["notes"]))
    if about["labels"]:
        show(f"labels    {', '.join(about['labels'])}")
    if about["source"] is not None:
        show(f"source    {about['source']}", f"target    {' | '.join(about['targets'])}")
