"""A cell, carried out."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune import api
from deltatune.core.errors import BackboneMismatchError, UnknownNameError


def test_the_seed_orders_the_rows_too() -> None:
    """Full tuning draws nothing: what differs between seeds is the order of the rows."""
    losses = [
        api.train(
            "t5-nano",
            "minimal_pairs",
            "full",
            budget="1 step",
            seed=seed,
            options={"train_rows": 40, "validation_rows": 4, "test_rows": 4},
        )
        .curve[-1]
        .loss
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_on_a_quantised_base_is_scored_on_one(tmp_path: Path) -> None:
    """The format is an option of the run, and stands in its artefact."""
    rows = {"train_rows": 8, "validation_rows": 4, "test_rows": 4}
    result = api.train(
        "t5-nano",
        "minimal_pairs",
        "lora(rank=2)",
        budget="1 step",
        options={**rows, "quantise": "int8"},
        folder=tmp_path,
    )
    assert result.base == api.plan("t5-nano", "lora").base
    found = api.evaluate(tmp_path / "delta", options=rows)
    assert found["scores"] == result.scores
    with pytest.raises(BackboneMismatchError, match="kept as plain numbers, not as int8"):
        api.evaluate(tmp_path / "delta", options={**rows, "quantise": None})
    with pytest.raises(UnknownNameError, match="int8"):
        api.evaluate(tmp_path / "delta", options={**rows, "quantise": 8})
