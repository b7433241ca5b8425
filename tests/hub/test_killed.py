"""Processes that push and pull on one hub and are killed; `make kill` plays many more rounds."""

from __future__ import annotations

from pathlib import Path

from tests.hub.killing import play


def test_processes_that_are_killed_leave_nothing_half_visible(tmp_path: Path) -> None:
    tally = play(tmp_path, processes=4, deltas=24, rounds=8)
    assert tally.kills == 32 and tally.verified > 24 and tally.stored > 0
