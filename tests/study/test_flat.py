"""Cells as flat rows: the columns are documented, and hold what the journal holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.study.fake import execute
from tests.study.test_store import done, failed, make_cell

from deltatune.study.cell import Cell, CellResult, Point
from deltatune.study.flat import COLUMNS, CURVE, curve, flatten
from deltatune.study.store import Done, MemoryStore
from deltatune.training.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def store_of(*cells: Cell, **changes: object) -> MemoryStore:
    store = MemoryStore()
    for cell in cells:
        result = execute(cell).model_copy(update=changes)
        store.append(Done(id=cell.id, cell=cell, result=result))
    return store


def test_every_field_has_its_column() -> None:
    """A new field is a new column: it is added to the table and to docs/study.md."""
    fields = {
        *(f"settings.{name}" for name in Settings.model_fields),
        *(name for name in Cell.model_fields if name not in ("settings", "at")),
        *(name for name in CellResult.model_fields if name != "curve"),
    }
    more = {"id", "state", "recorded", "writer", "target", "score", "ratio", "error", "message"}
    assert {name.removesuffix(".*") for name in COLUMNS} == fields | more
    assert set(CURVE) == {"id", *Point.model_fields}
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"`{name}`" not in text] == []


def test_rows_hold_what_the_journal_holds() -> None:
    settings = Settings(
        learning_rate=1e-3, betas=(0.9, 0.99), optimiser_options={"momentum": 0.5, "nesterov": True}
    )
    cell = make_cell(3)._changed(settings=settings, options={"train_rows": 7}, at="attention.q")
    store = store_of(cell, make_cell(4), notes=("One.", "Two."))
    store.append(failed(5))
    flat = flatten(store)
    first, second, third = flat.rows
    result = execute(cell)
    expected = {
        "id": cell.id,
        "state": "done",
        "target": "attention.q",
        "seed": 3,
        "settings.learning_rate": 1e-3,
        "settings.betas": "[0.9, 0.99]",
        "settings.optimiser_options.momentum": 0.5,
        "settings.optimiser_options.nesterov": True,
        "options.train_rows": 7,
        "scores.ACC": result.scores["ACC"],
        "score": result.score,
        "ratio": result.ratio,
        "rows.test": 1821,
        "versions.torch": "2.13.0",
        "notes": "One.\nTwo.",
        "stages": None,
        "error": None,
    }
    assert {name: first[name] for name in expected} == expected
    assert second["options.train_rows"] is None and second["settings.betas"] is None
    assert (third["state"], third["score"], third["message"]) == ("failed", None, "no")
    assert {len(row) for row in flat.rows} == {len(flat.columns)}


def test_columns_are_stable_and_typed() -> None:
    fixed = [name for name in COLUMNS if not name.endswith("*")]
    assert [column.name for column in flatten(MemoryStore()).columns] == fixed
    flat = flatten(store_of(make_cell(0), make_cell(1)))
    assert [column.name for column in flat.columns if column.name in COLUMNS] == fixed
    for row in flat.rows:
        for column in flat.columns:
            value = row[column.name]
            assert value is None or type(value) is column.type, column


@pytest.mark.parametrize(
    ("values", "kind"),
    [((1, 2), int), ((1, 2.5), float), ((True, False), bool), (("a", 1), str), ((None,), str)],
)
def test_columns_of_options_have_the_type_of_their_values(
    values: tuple[object, ...], kind: type
) -> None:
    cells = [make_cell(seed)._changed(options={"x.y": value}) for seed, value in enumerate(values)]
    flat = flatten(store_of(*cells))
    (column,) = (column for column in flat.columns if column.name == "options.x.y")
    assert column.type is kind
    assert all(type(row["options.x.y"]) in (kind, type(None)) for row in flat.rows)


def test_curves_are_rows_of_their_own() -> None:
    store = MemoryStore()
    store.append(done(1))
    rows = curve(store)
    assert [row["step"] for row in rows] == list(range(30, 301, 30))
    assert all(list(row) == list(CURVE) for row in rows) and rows[0]["id"] == make_cell(1).id
