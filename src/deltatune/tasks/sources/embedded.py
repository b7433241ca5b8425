"""Tasks built at run time from what is installed, kept in the user's cache."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.tasks.example import Row, SplitName, Tables
from deltatune.tasks.text import digest

if TYPE_CHECKING:
    from deltatune.tasks.task import Task

__all__ = ["CACHE_VARIABLE", "EmbeddedSource"]

CACHE_VARIABLE = "DELTATUNE_CACHE"


@dataclass(frozen=True)
class EmbeddedSource:
    """A builder of rows.

    Attributes:
        builder: its name in `tasks.embedded.BUILDERS`.
    """

    builder: str

    def read(self, task: Task) -> Tables:
        """Returns the rows, from the cache if the same library versions made it.

        Raises:
            UnknownNameError: there is no such builder.
            DataError: a library that the rows are made from is not installed with its sources.
        """
        from deltatune.tasks.embedded import BUILDERS

        builder = BUILDERS[self.builder]
        made_from = builder.made_from()
        key = digest(self.builder, builder.version, made_from)
        path = _cache_folder() / "embedded" / f"{self.builder}-{key}.json"
        content = _cached(path)
        if content is None:
            content = {name: [dict(row) for row in rows] for name, rows in builder.build().items()}
            _keep(path, content)
        splits: dict[SplitName, tuple[Row, ...]] = {
            name: tuple(
                Row(values, f"{task.name}, {name}, row {number}")
                for number, values in enumerate(rows, start=1)
            )
            for name, rows in content.items()
        }
        return Tables(
            splits,
            origin="built on this machine",
            status="generated",
            digest=digest(content),
            notes=(f"Made from {made_from}.",),
            final=True,
        )


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltatune"


def _cached(path: Path) -> dict[SplitName, list[dict[str, Any]]] | None:
    try:
        kept = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        # Not there, or cut short by a full disk: both are mended by building anew.
        return None
    if not isinstance(kept, dict) or kept.get("digest") != digest(kept.get("rows")):
        return None
    rows: dict[SplitName, list[dict[str, Any]]] = kept["rows"]
    return rows


def _keep(path: Path, rows: dict[SplitName, list[dict[str, Any]]]) -> None:
    """Writes the rows in one step. A cache that cannot be written costs time alone: no error."""
    content = json.dumps({"digest": digest(rows), "rows": rows}, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
        ) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
