"""`deltatune study status`: how far a study is, and what failed."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import Json, Study
from deltatune.cli.output import print_json, show

if TYPE_CHECKING:
    from deltatune.study.status import Status
    from deltatune.study.store import Failed

__all__ = ["status"]


def status(
    folder: Study,
    traces: Annotated[bool, typer.Option("--traces", help="Show the tracebacks too.")] = False,
    as_json: Json = False,
) -> None:
    """Say how far a study is, and what failed.

    The time left is that of the cells planned so far. Processes at work are not disturbed.
    """
    from deltatune.study.status import status as look
    from deltatune.study.store import open_study

    found = look(open_study(folder))
    if as_json:
        print_json(_data(found, traces))
    else:
        show(*_lines(found, traces))


def _data(found: Status, traces: bool) -> dict[str, Any]:
    return {
        "planned": found.planned,
        "done": found.done,
        "failed": len(found.failures),
        "running": {key: claim.worker for key, claim in found.running.items()},
        "waiting": found.waiting,
        "processes": found.processes,
        "mean_seconds": found.mean_seconds,
        "seconds_left": found.seconds_left,
        "failures": [_failure(record, traces) for record in found.failures],
    }


def _failure(record: Failed, traces: bool) -> dict[str, Any]:
    about = {
        "id": record.id,
        "cell": str(record.cell),
        "recorded": record.when,
        "error": record.error,
        "message": record.message,
    }
    return {**about, "trace": record.trace} if traces else about


def _lines(found: Status, traces: bool) -> list[str]:
    at_work = f" ({_processes(found.processes)})" if found.running else ""
    lines = [
        f"planned    {found.planned}",
        f"done       {found.done}",
        f"failed     {len(found.failures)}",
        f"running    {len(found.running)}{at_work}",
        f"waiting    {found.waiting}",
    ]
    if found.mean_seconds is not None:
        lines.append(f"time       {found.mean_seconds:.1f} s a cell")
    if found.seconds_left:
        left = timedelta(seconds=round(found.seconds_left))
        lines.append(f"left       {left} for {_processes(max(1, found.processes))}")
    for record in found.failures:
        first = (record.message.splitlines() or [""])[0]
        lines.append(f"failed     {record.cell}: {record.error}: {first}")
        if traces:
            lines.append(record.trace.rstrip())
    return lines


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"
