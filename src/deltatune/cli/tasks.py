"""`deltatune tasks`: what there is to train on."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltatune.cli.options import Data, Json, Protocol
from deltatune.cli.output import print_json, show
from deltatune.core.errors import ConfigurationError

__all__ = ["tasks"]

_SHOWN_LABELS = 8


def tasks(
    name: Annotated[str | None, typer.Argument(help="One task, in full.")] = None,
    data: Data = None,
    protocol: Protocol = None,
    check: Annotated[
        str | None,
        typer.Option(help="Measure its rows by this backbone's tokenizer.", metavar="BACKBONE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks, or read one and show an example."""
    from deltatune.tasks import find_task, known_tasks

    if name is not None:
        _show_one(_inspect(name, data, protocol or "clean", check), as_json)
        return
    if check is not None:
        raise ConfigurationError("--check needs a task: `deltatune tasks TASK --check BACKBONE`.")
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


def _inspect(name: str, data: str | None, protocol: Any, check: str | None) -> dict[str, Any]:
    from deltatune.tasks import find_task

    record = find_task(name)
    splits = record.load(data, protocol)
    first = splits.train[0] if splits.train else None
    checked = {} if check is None else {"check": _check(record, splits, check)}
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
        **checked,
    }


def _check(record: Any, splits: Any, backbone: str) -> dict[str, Any]:
    from deltatune.backbones.load import load_backbone
    from deltatune.execution.checking import check_rows

    return check_rows(record, splits, load_backbone(backbone))


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
    if "check" in about:
        show(*_checked(about["check"]))


def _checked(check: dict[str, Any]) -> list[str]:
    limits = check["limits"]
    lines = [f"limits    source {limits['source']}, target {limits['target']} tokens"]
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
