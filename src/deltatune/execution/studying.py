"""How the cells of a study are carried out and kept in its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.core.errors import ConfigurationError
from deltatune.execution import cell as execution
from deltatune.execution import ground
from deltatune.study.cell import Cell, CellResult
from deltatune.study.runner import Together
from deltatune.study.store import JournalStore
from deltatune.training.trunk_cache import TrunkCache

__all__ = ["Workplace"]


@dataclass(frozen=True)
class Workplace:
    """Where and how cells are carried out.

    Attributes:
        folder: of the study: `journal.jsonl`, and the deltas under `cells/`.
        data: where task rows are, see `Task.load`.
        slots: so many cells of one arm are trained at once over one base.
        trunk_cache: see `fit`; in memory, it serves one cell after the other.

    Raises:
        ConfigurationError: there is no slot.
    """

    folder: Path
    data: str | Path | None = None
    slots: int = 1
    trunk_cache: TrunkCache | None = None

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ConfigurationError(
                f"together is a number of cells from 1 on; found {self.slots}."
            )

    @property
    def store(self) -> JournalStore:
        """The store of the folder."""
        return JournalStore(self.folder)

    @property
    def together(self) -> Together | None:
        """How several cells are run at once; None where each is run by itself."""
        if self.slots == 1:
            return None
        return Together(self.slots, execution.shared_base, self._execute_together)

    def execute(self, cell: Cell) -> CellResult:
        """See `execution.cell.execute`."""
        return execution.execute(
            cell, data=self.data, folder=self._place(cell), trunk_cache=self.trunk_cache
        )

    def describe(self, backbone: str, task: str, protocol: str) -> dict[str, Any]:
        """See `execution.ground.describe`."""
        return ground.describe(backbone, task, protocol=protocol, data=self.data)

    def _execute_together(
        self, cells: Sequence[Cell], told: Callable[[Cell, CellResult | Exception], None]
    ) -> None:
        execution.execute_together(
            cells,
            told,
            slots=self.slots,
            data=self.data,
            folder=self._place,
            trunk_cache=self.trunk_cache,
        )

    def _place(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.id
