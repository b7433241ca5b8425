"""A hub as one page: what it holds, to look through without a program and without a network."""

from __future__ import annotations

from pathlib import Path

from deltatune.hub.hub import Hub

__all__ = ["write_site"]

_HOW = (
    "To use one: deltatune hub pull NAME --hub {url}, then dt.load(folder, model). A delta is held "
    "to its digest when it is pulled, and to the backbone when it is loaded; task and scores are "
    "what its maker says."
)


def write_site(hub: Hub, path: str | Path) -> Path:
    """Writes the page, whole or not at all, and returns where; the same bytes for the same hub.

    Raises:
        StateError: the file cannot be written.
        ArtefactError: the hub cannot be read, or an entry is broken.
    """
    from deltatune.study.report import write
    from deltatune.study.section import Column, Section, Table

    found = list(hub.entries())
    columns = (
        *(Column(title) for title in ("Name", "Task", "Scores", "Method", "Category", "Backbone")),
        Column("Numbers", "count"),
        Column("Bytes", "count"),
        Column("SHA-256"),
    )
    rows = tuple(
        (
            str(reference),
            entry.task or None,
            ", ".join(f"{name} {value:.4g}" for name, value in entry.scores.items()) or None,
            entry.method,
            ", ".join(entry.categories) or None,
            entry.backbone,
            entry.numbers,
            entry.size,
            entry.digest[:12],
        )
        for reference, entry in found
    )
    deltas = {entry.digest: entry for _, entry in found}
    facts = [
        ("names", f"{len(found):,}"),
        ("deltas", f"{len(deltas):,}"),
        ("bytes", f"{sum(entry.size for entry in deltas.values()):,}"),
    ]
    section = Section(
        "What it holds",
        text=(_HOW.format(url=hub.url),),
        parts=(Table("Deltas", columns, rows),),
    )
    return write(path, "A hub of deltas", hub.url, facts, [section])
