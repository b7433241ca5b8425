"""A dataset of the Hugging Face hub, read through `datasets` at one commit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.core.errors import DataError, UnknownNameError, UnsupportedError
from deltatune.tasks.example import Row, SplitName, Tables
from deltatune.tasks.specification import HubSpecification
from deltatune.tasks.text import digest

if TYPE_CHECKING:
    from deltatune.tasks.task import Task

__all__ = ["HubSource"]

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub, or a local folder of the same form.

    Without a network the hub's cache on this machine is read. Code of a dataset's repository is
    never run. Where the record pins no revision, the newest commit is looked up first and named in
    the notes, so that the same rows can be had again.

    Attributes:
        specification: dataset, configuration and revision.
    """

    specification: HubSpecification

    def read(self, task: Task) -> Tables:
        """Returns the rows of `task`.

        Raises:
            UnsupportedError: `datasets` is not installed.
            DataError: the dataset cannot be had, or lacks a column of the record.
        """
        wanted = self.specification
        content, revision = self._load(task)
        splits: dict[SplitName, tuple[Row, ...]] = {}
        for name, published in self._splits(content).items():
            columns = content[published].column_names
            for field in task.fields:
                if field not in columns:
                    unknown = UnknownNameError("column", field, columns)
                    raise DataError(f"{wanted.dataset}, {published}: {unknown}")
            wanted_columns = {*task.fields, task.splits.order if task.splits else None}
            table = content[published].select_columns([c for c in columns if c in wanted_columns])
            splits[name] = tuple(
                Row(row, f"{wanted.dataset}, {published}, row {number}")
                for number, row in enumerate(table, start=1)
            )
        content_digest = digest(
            {name: [dict(row.values) for row in rows] for name, rows in splits.items()}
        )
        at = revision or "local"
        note = f"Hub dataset {wanted.dataset}, revision {at}, content {content_digest}."
        return Tables(splits, f"hub {wanted.dataset}", "complete", content_digest, (note,))

    def _splits(self, content: Collection[str]) -> dict[SplitName, str]:
        """Our split to the hub's; raises DataError if one that the record names is not there."""
        named = self.specification.splits
        for name in named.values():
            if name not in content:
                unknown = UnknownNameError("split", name, content)
                raise DataError(f"{self.specification.dataset}: {unknown}")
        return dict(named) or {name: name for name in _SPLITS if name in content}

    def _load(self, task: Task) -> tuple[Any, str | None]:
        wanted = self.specification
        try:
            import datasets
        except ImportError as error:
            raise UnsupportedError(
                f"{task.name}: reading {wanted.dataset} from the hub needs the package datasets. "
                "Install it with: pip install 'deltatune[data]'"
            ) from error
        try:
            place, revision = self._place()
            # A folder or a snapshot of the cache is one commit already and takes no revision.
            pinned = revision if place == wanted.dataset else None
            return datasets.load_dataset(place, wanted.config, revision=pinned), revision
        except Exception as error:
            # `datasets` raises whatever its file systems and parsers raise.
            raise DataError(
                f"{task.name}: the hub dataset {wanted.dataset} cannot be read: {error} Set "
                "DELTATUNE_DATA to a folder that holds the task, or connect to the hub once."
            ) from error

    def _place(self) -> tuple[str, str | None]:
        """Returns what to load (hub id or folder) and its commit."""
        from huggingface_hub import HfApi, snapshot_download

        wanted = self.specification
        if Path(wanted.dataset).is_dir():
            return wanted.dataset, None
        try:
            return wanted.dataset, HfApi().dataset_info(
                wanted.dataset, revision=wanted.revision
            ).sha
        except Exception:
            # No network, no such dataset, or whatever else the HTTP client of the day raises: what
            # lies in the hub's cache may do, and if it does not, its error is the one to show.
            folder = snapshot_download(
                wanted.dataset,
                repo_type="dataset",
                revision=wanted.revision,
                local_files_only=True,
            )
            return folder, Path(folder).name
