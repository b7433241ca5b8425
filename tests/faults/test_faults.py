"""Every row of the table of silent faults holds, here and on the installed PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.faults import IN_README, PAGE, README, line
from tests.faults.faults import FAULTS, NONE

RUN_ON_PEFT = {name: one for name, one in FAULTS.items() if one.on_peft is not None}


@pytest.mark.parametrize("name", FAULTS)
def test_here_it_is_clear(name: str, tmp_path: Path) -> None:
    row = line(FAULTS[name], FAULTS[name].ours(tmp_path))
    assert row in PAGE.read_text(encoding="utf-8"), "the page is old: make faults"
    assert name not in IN_README or row in README.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN_ON_PEFT)
def test_peft_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    check = FAULTS[name].on_peft
    assert check is not None and check(tmp_path) == FAULTS[name].peft


def test_every_row_names_a_fault_of_somebody() -> None:
    for one in FAULTS.values():
        assert {one.peft, one.adapters, one.opendelta} != {NONE}, one.title
