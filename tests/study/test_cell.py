from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.study.cell import Cell, CellResult
from deltatune.training.settings import Settings

CELLS = st.builds(
    Cell,
    backbone=st.sampled_from(["t5-mini", "minilm", "größer/model"]),
    method=st.sampled_from(["lora", "lora(rank=4) + bitfit"]),
    at=st.sampled_from([None, "attention.q"]),
    task=st.sampled_from(["glue_sst2", "emotion"]),
    seed=st.integers(0, 2**31),
    budget=st.sampled_from(["300 steps", "2.5 epochs", "1e6 tokens"]),
    settings=st.builds(Settings, learning_rate=st.floats(1e-6, 1.0)),
)


@given(CELLS)
def test_a_cell_survives_json_with_its_id(cell: Cell) -> None:
    again = Cell.model_validate_json(cell.model_dump_json())
    assert again == cell and again.id == cell.id


@given(CELLS, CELLS)
def test_equal_ids_mean_equal_cells(one: Cell, other: Cell) -> None:
    assert (one.id == other.id) == (one == other)


def test_the_spelling_of_a_budget_does_not_matter() -> None:
    cells = [
        Cell(backbone="b", method="lora", task="t", budget=b) for b in ("60 s", "1 minute")[1:]
    ]
    cells.append(Cell(backbone="b", method="lora", task="t", budget="60 seconds"))
    assert len({cell.id for cell in cells}) == 1


def test_everything_that_decides_a_result_changes_the_id() -> None:
    cell = Cell(backbone="b", method="lora", task="t", budget="9 steps")
    others = [
        cell.with_seed(1),
        cell.with_learning_rate(1e-3),
        *(
            Cell(**{"backbone": "b", "method": "lora", "task": "t", "budget": "9 steps", **change})
            for change in (
                {"backbone": "c"},
                {"revision": "0123"},
                {"method": "bitfit"},
                {"at": "ffn.up"},
                {"task": "u"},
                {"protocol": "faithful"},
                {"data": "1:abc"},
                {"budget": "10 steps"},
                {"settings": {"warmup_steps": 3}},
                {"options": {"train_rows": 100}},
                {"code": "fedc"},
            )
        ),
    ]
    assert len({cell.id, *(other.id for other in others)}) == 1 + len(others)


def test_saving_checkpoints_does_not_change_the_id() -> None:
    often = Settings(checkpoint_every=1)
    cell = Cell(backbone="b", method="lora", task="t", budget="9 steps")
    assert (
        Cell(backbone="b", method="lora", task="t", budget="9 steps", settings=often).id == cell.id
    )


def test_the_seed_of_the_settings_is_that_of_the_cell() -> None:
    cell = Cell(backbone="b", method="m", task="t", budget="9 steps", settings={"seed": 5}, seed=2)
    assert cell.settings.seed == 2
    assert cell.with_seed(7).settings.seed == 7


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"metod": "lora"}, UnknownNameError, "Did you mean 'method'"),
        ({"budget": "9 stps"}, UnknownNameError, "Did you mean 'steps'"),
        ({"seed": -1}, ConfigurationError, "greater than or equal to 0. Found -1"),
        ({"settings": {"warmup": 1}}, UnknownNameError, "warmup_steps"),
    ],
)
def test_a_cell_that_cannot_be_meant_is_refused(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Cell(**{"backbone": "b", "method": "m", "task": "t", "budget": "9 steps", **fields})


def test_a_result_holds_its_metric_and_survives_json() -> None:
    result = CellResult(metric="r", scores={"r": math.nan}, trainable=3, base=12)
    again = CellResult.model_validate_json(result.model_dump_json())
    assert math.isnan(again.score) and again.ratio == 0.25
    with pytest.raises(ConfigurationError, match=r"not the metric acc"):
        CellResult(metric="acc", scores={"r": 1.0}, trainable=3, base=12)
