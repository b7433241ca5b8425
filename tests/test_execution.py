"""A cell, carried out."""

from __future__ import annotations

from deltatune import api


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
